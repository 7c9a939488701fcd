//! Hosts for a cluster: one network namespace and one control group each, on a switch of their own. What may pass between
//! them is a packet filter in each host, written anew as a whole at every change, so that no fault outlives its list.
//!
//! Each member has two addresses: the one that clients are told, and its own. The runner's connections to the latter stand
//! for somebody on the host itself (monitoring, clients beside the server), whom no cut concerns.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use pgvigil::demo::Host;

const PREFIX: &str = "pgvf";
const FREEZER: &str = "/sys/fs/cgroup/freezer";
const PIDS: &str = "/sys/fs/cgroup/pids";
/// Of the runner on every bridge.
const RUNNER: u8 = 254;
/// Between a member's own address and the one that clients are told.
const PUBLISHED: u8 = 100;
const FIRST_ETCD: u8 = 21;
const SWITCH: &str = "switch";
/// The runner changes things from another host.
pub const TOKEN: &str = "faults";

pub struct Hosts {
    number: u8,
    /// Name of the host → its last byte.
    addresses: BTreeMap<String, u8>,
    rules: BTreeMap<String, Vec<Rule>>,
    /// The number is ours as long as this is bound; it leaves no file and goes with the process.
    _claim: UnixListener,
}

/// What one host's filter drops.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// From (`incoming`) or to these addresses; empty: everybody.
    Drop { peers: Vec<Ipv4Addr>, incoming: bool, port: Option<u16> },
    /// What comes to the published address, or goes out from it.
    Clients { incoming: bool },
    /// One packet in so many of a hundred, both ways.
    Loss { percent: u8 },
    /// Packets longer than this, on their way out.
    LongerThan { bytes: u16 },
    /// Bytes a second, both ways; more is dropped.
    Rate { kbytes: u32 },
}

/// Why this machine cannot have such hosts.
pub fn impossible() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("network namespaces, mounts and control groups need root".to_owned());
    }
    let missing: Vec<&str> = ["ip", "nft", "nsenter", "mkfs.ext4", "fsfreeze", "mount", "etcdctl"]
        .into_iter()
        .filter(|program| find(program).is_none())
        .collect();
    if !missing.is_empty() {
        return Some(format!(
            "not installed: {} (Debian: iproute2 nftables util-linux e2fsprogs etcd-client)",
            missing.join(", ")
        ));
    }
    for group in [FREEZER, PIDS] {
        if !PathBuf::from(group).join("tasks").exists() {
            return Some(format!("no control groups at {group}"));
        }
    }
    run("ip", &["netns", "list"], "").err().map(|why| format!("no network namespaces: {why}"))
}

pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    directories.map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// Runs a program that ends at once; its complaint is the error.
pub fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    let path = find(program).ok_or_else(|| format!("{program} is not installed"))?;
    let mut child = Command::new(path)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read ends the pipe; its status says what went wrong.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

impl Hosts {
    pub fn make(members: &[String], etcd: usize) -> Result<Hosts, String> {
        let (number, claim) = (1..250).find_map(claim).ok_or("all numbers of bridges are taken")?;
        // Whoever had it before was killed before it could clean up.
        sweep(number);
        let members = members.iter().cloned().zip(1..);
        let stores = (1..=etcd).map(|n| format!("etcd-{n}")).zip(FIRST_ETCD..);
        let addresses: BTreeMap<String, u8> = members.chain(stores).collect();
        let hosts = Hosts { number, addresses, rules: BTreeMap::new(), _claim: claim };
        hosts.build()?;
        Ok(hosts)
    }

    fn build(&self) -> Result<(), String> {
        // The bridge has a namespace of its own: where containers are run, the machine's filter looks into its bridges.
        let (runner, switch) = (format!("{PREFIX}{}", self.number), self.space(SWITCH));
        let mut batch = format!(
            "netns add {switch}\nlink add {runner} type veth peer name runner netns {switch}\n\
             addr add {}/24 dev {runner}\nlink set {runner} up\n",
            self.at(RUNNER)
        );
        let mut ports =
            "link add bridge type bridge\nlink set bridge up\nlink set runner master bridge up\n".to_owned();
        for (name, last) in &self.addresses {
            let space = self.space(name);
            let _ = write!(
                batch,
                "netns add {space}\nlink add eth0 netns {space} type veth peer name port{last} netns {switch}\n"
            );
            let _ = writeln!(ports, "link set port{last} master bridge up");
        }
        run("ip", &["-batch", "-"], &batch)?;
        run("ip", &["-n", &switch, "-batch", "-"], &ports)?;
        for (name, last) in &self.addresses {
            let (own, published) = (self.at(*last), self.at(last + PUBLISHED));
            let batch = format!(
                "addr add {own}/24 dev eth0\naddr add {published}/24 dev eth0\nlink set eth0 up\nlink set lo up\n"
            );
            run("ip", &["-n", &self.space(name), "-batch", "-"], &batch)?;
            for group in [FREEZER, PIDS] {
                let group = format!("{group}/{}", self.space(name));
                std::fs::create_dir(&group).map_err(|error| format!("make {group}: {error}"))?;
            }
        }
        Ok(())
    }

    fn at(&self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, self.number, last)
    }

    fn space(&self, name: &str) -> String {
        format!("{PREFIX}{}-{name}", self.number)
    }

    pub fn address(&self, name: &str) -> Option<Ipv4Addr> {
        self.addresses.get(name).map(|last| self.at(*last))
    }

    /// Where clients are told to go.
    pub fn published(&self, name: &str) -> Option<Ipv4Addr> {
        self.addresses.get(name).map(|last| self.at(last + PUBLISHED))
    }

    /// For the cluster: programs are started through this.
    pub fn host(&self, name: &str) -> Host {
        let space = self.space(name);
        let script = format!(
            "for g in {FREEZER} {PIDS}; do echo $$ >$g/{space}/tasks || exit 1; done; \
             export PGVIGIL_API_TOKEN={TOKEN}; exec \"$@\""
        );
        let through = ["sh", "-c", &script, "sh", "nsenter", &format!("--net=/run/netns/{space}"), "--"];
        Host {
            address: IpAddr::V4(self.address(name).unwrap_or(Ipv4Addr::LOCALHOST)),
            through: through.iter().map(OsString::from).collect(),
            listen: "*".to_owned(),
            clients: format!("10.213.{}.0/24", self.number),
        }
    }

    // === Network ===

    pub fn add(&mut self, name: &str, rules: impl IntoIterator<Item = Rule>) -> Result<(), String> {
        self.rules.entry(name.to_owned()).or_default().extend(rules);
        self.apply(name)
    }

    pub fn clear(&mut self, name: &str) -> Result<(), String> {
        match self.rules.remove(name) {
            None => Ok(()),
            Some(_) => self.apply(name),
        }
    }

    pub fn clear_all(&mut self) -> Result<(), String> {
        let names: Vec<String> = self.rules.keys().cloned().collect();
        names.iter().try_for_each(|name| self.clear(name))
    }

    fn apply(&self, name: &str) -> Result<(), String> {
        let rules = self.rules.get(name).map(Vec::as_slice).unwrap_or_default();
        let last = self.addresses.get(name).copied().unwrap_or_default();
        let text = filter(rules, self.at(RUNNER), self.at(last), self.at(last + PUBLISHED));
        run("nsenter", &[&format!("--net=/run/netns/{}", self.space(name)), "--", "nft", "-f", "-"], &text).map(|_| ())
    }

    // === Control groups ===

    pub fn freeze(&self, name: &str, frozen: bool) -> Result<(), String> {
        let file = format!("{FREEZER}/{}/freezer.state", self.space(name));
        let state = if frozen { "FROZEN" } else { "THAWED" };
        std::fs::write(&file, state).map_err(|error| format!("write {state} to {file}: {error}"))
    }

    /// No more processes and threads than there are now, and `more`; `None`: no limit.
    pub fn limit_processes(&self, name: &str, more: Option<u64>) -> Result<(), String> {
        let group = format!("{PIDS}/{}", self.space(name));
        let failed = |error| format!("limit processes in {group}: {error}");
        let limit = match more {
            None => "max".to_owned(),
            Some(more) => {
                let text = std::fs::read_to_string(format!("{group}/pids.current")).map_err(failed)?;
                (text.trim().parse::<u64>().unwrap_or(0) + more).to_string()
            }
        };
        std::fs::write(format!("{group}/pids.max"), limit).map_err(failed)
    }

    pub fn processes(&self, name: &str) -> Vec<i32> {
        let text = std::fs::read_to_string(format!("{FREEZER}/{}/cgroup.procs", self.space(name))).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    pub fn thaw_on_drop(&self) -> Thaw {
        Thaw(self.number)
    }

    /// Everything that was done to hosts is undone.
    pub fn heal(&mut self) -> Result<(), String> {
        let names: Vec<String> = self.addresses.keys().cloned().collect();
        for name in &names {
            self.freeze(name, false)?;
            self.limit_processes(name, None)?;
        }
        self.clear_all()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        sweep(self.number);
    }
}

/// Lets everything frozen go on when it is dropped.
pub struct Thaw(u8);

impl Drop for Thaw {
    fn drop(&mut self) {
        for group in named(FREEZER, self.0) {
            let _ = std::fs::write(format!("{FREEZER}/{group}/freezer.state"), "THAWED");
        }
    }
}

/// Entries of a directory that carry this number.
fn named(directory: &str, number: u8) -> Vec<String> {
    let prefix = format!("{PREFIX}{number}-");
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.starts_with(&prefix)).collect()
}

/// The filter of one host as nft reads it.
fn filter(rules: &[Rule], runner: Ipv4Addr, own: Ipv4Addr, published: Ipv4Addr) -> String {
    let chain = |incoming: bool| {
        // The other end, this end, as they stand in a packet of this direction.
        let (hook, device, there, here) =
            if incoming { ("input", "iifname", "saddr", "daddr") } else { ("output", "oifname", "daddr", "saddr") };
        let mut text = format!(
            "  chain {hook} {{\n    type filter hook {hook} priority 0; policy accept;\n    {device} \"lo\" accept\n    \
             ip {there} {runner} ip {here} {own} accept\n"
        );
        for rule in rules {
            let _ = match rule {
                Rule::Drop { incoming: way, .. } | Rule::Clients { incoming: way } if *way != incoming => Ok(()),
                Rule::Clients { .. } => writeln!(text, "    ip {here} {published} drop"),
                Rule::Drop { peers, port, .. } => {
                    let peers: Vec<String> = peers.iter().map(Ipv4Addr::to_string).collect();
                    let whom = if peers.is_empty() {
                        String::new()
                    } else {
                        format!("ip {there} {{ {} }} ", peers.join(", "))
                    };
                    match port {
                        None => writeln!(text, "    {whom}drop"),
                        Some(port) => {
                            writeln!(text, "    {whom}tcp sport {port} drop\n    {whom}tcp dport {port} drop")
                        }
                    }
                }
                Rule::Loss { percent } => writeln!(text, "    numgen random mod 100 < {percent} drop"),
                Rule::LongerThan { .. } if incoming => Ok(()),
                Rule::LongerThan { bytes } => writeln!(text, "    meta length > {bytes} drop"),
                Rule::Rate { kbytes } => {
                    writeln!(text, "    limit rate over {kbytes} kbytes/second burst 64 kbytes drop")
                }
            };
        }
        text + "  }\n"
    };
    // Deleting a table that is not there is an error; making one that is there is none.
    format!(
        "table inet faults {{}}\ndelete table inet faults\ntable inet faults {{\n{}{}}}\n",
        chain(true),
        chain(false)
    )
}

fn claim(number: u8) -> Option<(u8, UnixListener)> {
    let name = SocketAddr::from_abstract_name(format!("pgvigil-faults-{number}")).ok()?;
    Some((number, UnixListener::bind_addr(&name).ok()?))
}

/// Takes away everything that carries this number; processes in its namespaces were ended before, or are ended now.
fn sweep(number: u8) {
    drop(Thaw(number));
    for group in named(FREEZER, number) {
        let begun = std::time::Instant::now();
        while std::fs::remove_dir(format!("{FREEZER}/{group}")).is_err() && begun.elapsed().as_secs() < 10 {
            let text = std::fs::read_to_string(format!("{FREEZER}/{group}/cgroup.procs")).unwrap_or_default();
            for pid in text.lines().filter_map(|line| line.parse().ok()) {
                pgvigil::demo::processes::send(pid, nix::sys::signal::Signal::SIGKILL);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
    for group in named(PIDS, number) {
        let _ = std::fs::remove_dir(format!("{PIDS}/{group}"));
    }
    for space in named("/run/netns", number) {
        let _ = run("ip", &["netns", "delete", &space], "");
    }
    if PathBuf::from(format!("/sys/class/net/{PREFIX}{number}")).exists() {
        let _ = run("ip", &["link", "delete", &format!("{PREFIX}{number}")], "");
    }
}
