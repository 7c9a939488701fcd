//! Real etcd clusters on loopback: free ports, data in a temporary directory, fast elections, gone when dropped.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgvigil::config::EtcdConfig;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;

use super::{program, skipped, wait_until};

/// How long one member may take to be ready: much more than it needs on a loaded machine.
const START: Duration = Duration::from_secs(30);

/// How often a cluster is begun anew because somebody else took one of its ports.
const ATTEMPTS: usize = 3;

#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Serve clients with TLS by these certificates, and ask for a client certificate.
    pub tls: Option<Certificates>,
    /// Further arguments of every member.
    pub arguments: Vec<String>,
}

/// Members that run until this is dropped.
pub struct Cluster {
    members: Vec<Member>,
    options: Options,
    // Dropped after the members: they hold files in it.
    dir: TempDir,
}

struct Member {
    name: String,
    client_url: String,
    peer_url: String,
    running: Option<Running>,
}

struct Running {
    child: Child,
    ready: watch::Receiver<bool>,
}

impl Cluster {
    /// `None` where etcd is not installed: said on the terminal.
    pub async fn start(members: usize) -> Option<Cluster> {
        Cluster::start_with(members, Options::default()).await
    }

    pub async fn start_with(members: usize, options: Options) -> Option<Cluster> {
        if program("etcd").is_none() {
            skipped("etcd is not installed");
            return None;
        }
        for _ in 1..ATTEMPTS {
            if let Ok(cluster) = Cluster::attempt(members, &options).await {
                return Some(cluster);
            }
        }
        match Cluster::attempt(members, &options).await {
            Ok(cluster) => Some(cluster),
            Err(why) => panic!("etcd does not start: {why}"),
        }
    }

    async fn attempt(members: usize, options: &Options) -> Result<Cluster, String> {
        let dir = TempDir::new().expect("a temporary directory");
        let scheme = if options.tls.is_some() { "https" } else { "http" };
        let members = (0..members).map(|n| Member {
            name: format!("etcd{n}"),
            client_url: format!("{scheme}://127.0.0.1:{}", free_port()),
            peer_url: format!("http://127.0.0.1:{}", free_port()),
            running: None,
        });
        let mut cluster = Cluster { members: members.collect(), options: options.clone(), dir };
        for n in 0..cluster.members.len() {
            cluster.spawn(n);
        }
        for n in 0..cluster.members.len() {
            cluster.ready(n).await?;
        }
        Ok(cluster)
    }

    /// One URL per member.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|m| m.client_url.clone()).collect()
    }

    /// As an agent's settings would have it, for all members.
    pub fn config(&self) -> EtcdConfig {
        let tls = self.options.tls.as_ref();
        EtcdConfig {
            endpoints: self.endpoints(),
            user: None,
            ca_file: tls.map(|t| t.ca.clone()),
            cert_file: tls.map(|t| t.client_certificate.clone()),
            key_file: tls.map(|t| t.client_key.clone()),
            try_timeout: Duration::from_millis(700),
            prefix: "/pgvigil".to_owned(),
        }
    }

    /// A plain client of one member, for what a person would do with etcdctl. Not for clusters with TLS.
    pub async fn client(&self, member: usize, user: Option<(&str, &str)>) -> Client {
        let mut options =
            ConnectOptions::new().with_timeout(Duration::from_secs(10)).with_connect_timeout(Duration::from_secs(1));
        if let Some((name, password)) = user {
            options = options.with_user(name, password);
        }
        Client::connect([&self.members[member].client_url], Some(options)).await.expect("connect to etcd")
    }

    /// Which member leads the others.
    pub async fn leader(&self) -> usize {
        let mut found = None;
        wait_until("etcd has a leader", Duration::from_secs(10), async || {
            for n in 0..self.members.len() {
                if self.members[n].running.is_none() {
                    continue;
                }
                let mut client = self.client(n, None).await;
                if let Ok(Ok(status)) = timeout(Duration::from_millis(500), client.status()).await
                    && status.header().is_some_and(|h| h.member_id() == status.leader())
                {
                    found = Some(n);
                    return true;
                }
            }
            false
        })
        .await;
        found.expect("waited for")
    }

    /// SIGKILL.
    pub fn kill(&mut self, member: usize) {
        self.members[member].running = None;
    }

    /// SIGSTOP: connections stay, nobody answers.
    pub fn pause(&self, member: usize) {
        self.signal(member, Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub fn resume(&self, member: usize) {
        self.signal(member, Signal::SIGCONT);
    }

    /// Starts a killed member on its old data; does not wait, since a member alone is not ready before its majority is.
    pub fn start_again(&mut self, member: usize) {
        self.spawn(member);
    }

    /// Waits until a started member answers clients.
    pub async fn ready(&mut self, member: usize) -> Result<(), String> {
        let log = self.log(member);
        let running = self.members[member].running.as_mut().expect("started");
        match timeout(START, running.ready.wait_for(|ready| *ready)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(format!("etcd ended:\n{}", tail(&log))),
            Err(_) => Err(format!("etcd is not ready after {START:?}:\n{}", tail(&log))),
        }
    }

    fn signal(&self, member: usize, signal: Signal) {
        let running = self.members[member].running.as_ref().expect("running");
        kill(Pid::from_raw(running.child.id() as i32), signal).expect("our own child");
    }

    fn log(&self, member: usize) -> PathBuf {
        self.dir.path().join(format!("{}.log", self.members[member].name))
    }

    fn spawn(&mut self, member: usize) {
        let everybody: Vec<String> = self.members.iter().map(|m| format!("{}={}", m.name, m.peer_url)).collect();
        let Member { name, client_url, peer_url, .. } = &self.members[member];
        let mut command = Command::new("etcd");
        command
            .args(["--name", name, "--data-dir"])
            .arg(self.dir.path().join(name))
            .args(["--listen-client-urls", client_url, "--advertise-client-urls", client_url])
            .args(["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url])
            .args(["--initial-cluster", &everybody.join(","), "--initial-cluster-state", "new"])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500", "--logger", "zap"])
            .args(&self.options.arguments);
        if let Some(tls) = &self.options.tls {
            command
                .arg("--cert-file")
                .arg(&tls.server_certificate)
                .arg("--key-file")
                .arg(&tls.server_key)
                .arg("--client-cert-auth")
                .arg("--trusted-ca-file")
                .arg(&tls.ca);
        }
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("start etcd");
        let (ready, says_ready) = watch::channel(false);
        let log = File::options().create(true).append(true).open(self.log(member)).expect("open the log");
        let lines = BufReader::new(child.stderr.take().expect("piped"));
        // Ends with the member's standard error. Reads on to the end, or etcd would block on a full pipe.
        std::thread::spawn(move || follow_log(lines, log, &ready));
        self.members[member].running = Some(Running { child, ready: says_ready });
    }
}

/// etcd says in its log when it has joined its majority and serves clients, and when it knows which requests the cluster's
/// version allows (before that, they are turned away): these are the events to wait for.
fn follow_log(lines: impl BufRead, mut log: File, ready: &watch::Sender<bool>) {
    let (mut serves, mut capable) = (false, false);
    for line in lines.split(b'\n').map_while(Result::ok) {
        let _ = log.write_all(&line).and_then(|()| log.write_all(b"\n"));
        let line = String::from_utf8_lossy(&line);
        serves |= line.contains("serving client traffic");
        capable |= line.contains("enabled capabilities for version");
        if serves && capable {
            ready.send_replace(true);
        }
    }
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

impl Drop for Running {
    /// By the id of our own child; a stopped one dies of SIGKILL as well.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nobody listens on now, below the range from which the kernel takes ports of outgoing connections. Each
/// process begins somewhere else, and no port is given twice by one process.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 12_000;
    const COUNT: u16 = 18_000;
    let begin = (std::process::id().wrapping_mul(97) % u32::from(COUNT)) as u16;
    loop {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(n < COUNT, "no free port");
        let port = FIRST + (begin + n) % COUNT;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

// === Certificates ===

/// Made by openssl, valid for 127.0.0.1.
#[derive(Clone, Debug)]
pub struct Certificates {
    pub ca: PathBuf,
    pub server_certificate: PathBuf,
    pub server_key: PathBuf,
    pub client_certificate: PathBuf,
    pub client_key: PathBuf,
    /// Signs nothing of the above.
    pub other_ca: PathBuf,
}

impl Certificates {
    /// `None` where openssl is not installed: said on the terminal.
    pub fn make(dir: &Path) -> Option<Certificates> {
        if program("openssl").is_none() {
            skipped("openssl is not installed");
            return None;
        }
        let (ca, ca_key) = authority(dir, "ca");
        let (other_ca, _) = authority(dir, "other-ca");
        let (server_certificate, server_key) = certificate(dir, "server", &ca, &ca_key);
        let (client_certificate, client_key) = certificate(dir, "client", &ca, &ca_key);
        Some(Certificates { ca, server_certificate, server_key, client_certificate, client_key, other_ca })
    }
}

fn authority(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    let (certificate, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    openssl(dir, |c| {
        c.args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-subj",
        ])
        .arg(format!("/CN={name}"))
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
    });
    (certificate, key)
}

fn certificate(dir: &Path, name: &str, ca: &Path, ca_key: &Path) -> (PathBuf, PathBuf) {
    let file = |kind: &str| dir.join(format!("{name}.{kind}"));
    openssl(dir, |c| {
        c.args(["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj"])
            .arg(format!("/CN={name}"))
            .arg("-keyout")
            .arg(file("key"))
            .arg("-out")
            .arg(file("csr"))
    });
    std::fs::write(file("ext"), "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
        .expect("write into the temporary directory");
    openssl(dir, |c| {
        c.args(["x509", "-req", "-days", "2", "-CAcreateserial", "-in"])
            .arg(file("csr"))
            .arg("-CA")
            .arg(ca)
            .arg("-CAkey")
            .arg(ca_key)
            .arg("-extfile")
            .arg(file("ext"))
            .arg("-out")
            .arg(file("crt"))
    });
    (file("crt"), file("key"))
}

fn openssl(dir: &Path, arguments: impl FnOnce(&mut Command) -> &mut Command) {
    let mut command = Command::new("openssl");
    let output = arguments(&mut command).current_dir(dir).output().expect("run openssl");
    assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
}
