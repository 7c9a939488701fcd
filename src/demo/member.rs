//! One member of a demo cluster: its directories, its configuration file, its agent.

use std::fmt::Write;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::ports::Port;
use super::processes::{self, Process};
use super::{DemoError, Host};

pub struct Member {
    pub name: String,
    pub directory: PathBuf,
    pub host: Host,
    pub port: u16,
    pub api_port: u16,
    pub endpoint_port: u16,
    pub read_only_port: u16,
    _ports: [Port; 4],
    agent: Option<Process>,
}

/// The passwords of a cluster that lives on loopback for minutes.
pub const SUPERUSER_PASSWORD: &str = "demo-superuser";
const INTERNAL_PASSWORD: &str = "demo-internal";

/// PostgreSQL's user when we are root; else everything is ours.
pub struct Owner {
    pub name: String,
    ids: Option<(u32, u32)>,
}

impl Owner {
    pub fn find() -> Result<Owner, DemoError> {
        if !nix::unistd::geteuid().is_root() {
            let name = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name);
            return Ok(Owner { name: name.unwrap_or_else(|| "postgres".to_owned()), ids: None });
        }
        match nix::unistd::User::from_name("postgres") {
            Ok(Some(user)) => Ok(Owner { name: user.name, ids: Some((user.uid.as_raw(), user.gid.as_raw())) }),
            Ok(None) | Err(_) => Err(DemoError::Missing {
                what: "the user `postgres`".to_owned(),
                remedy: "install PostgreSQL (Debian: `apt-get install postgresql`), or run as an ordinary user"
                    .to_owned(),
            }),
        }
    }

    /// PostgreSQL's user has to get to its data through every directory above.
    pub fn can_reach(&self, directory: &Path) -> Result<(), DemoError> {
        let Some((uid, _)) = self.ids else { return Ok(()) };
        let closed =
            |path: &&Path| fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o001 == 0 && m.uid() != uid);
        match directory.ancestors().find(closed) {
            None => Ok(()),
            Some(path) => Err(DemoError::failed(
                format!("use {}", directory.display()),
                format!("`{}` may not enter {}; open it (chmod o+x) or name another --dir", self.name, path.display()),
            )),
        }
    }

    fn make(&self, directory: &Path, mode: u32) -> Result<(), DemoError> {
        let what = || format!("make {}", directory.display());
        fs::create_dir_all(directory).map_err(|error| DemoError::failed(what(), error))?;
        if let Some((uid, gid)) = self.ids {
            chown(directory, Some(uid), Some(gid)).map_err(|error| DemoError::failed(what(), error))?;
        }
        fs::set_permissions(directory, fs::Permissions::from_mode(mode))
            .map_err(|error| DemoError::failed(what(), error))
    }
}

/// What all members' files have in common.
pub struct Common {
    pub cluster: String,
    pub etcd: Vec<String>,
    /// Name, address, PostgreSQL's port, agent's port.
    pub members: Vec<(String, IpAddr, u16, u16)>,
    pub durability: String,
    /// `ttl = "8s"` and the like, for `[lease]`.
    pub lease: String,
    pub etcd_try_timeout: String,
    /// Lines of [postgresql.parameters].
    pub parameters: String,
    /// Lines of `[endpoint]` besides its ports; `None`: no endpoint.
    pub endpoint: Option<String>,
    pub log_level: String,
}

impl Member {
    /// `ports`: PostgreSQL's, the agent's, the endpoint's two.
    pub fn new(base: &Path, name: &str, host: Host, ports: [Port; 4]) -> Member {
        let [port, api_port, endpoint_port, read_only_port] = [0, 1, 2, 3].map(|at: usize| ports[at].number);
        let directory = base.join(name);
        Member {
            name: name.to_owned(),
            directory,
            host,
            port,
            api_port,
            endpoint_port,
            read_only_port,
            _ports: ports,
            agent: None,
        }
    }

    pub fn data_dir(&self) -> PathBuf {
        self.directory.join("pg/data")
    }

    pub fn agent_log(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    pub fn config_file(&self) -> PathBuf {
        self.directory.join("pgvigil.toml")
    }

    pub fn url(&self) -> String {
        format!("http://{}:{}", self.host.address, self.api_port)
    }

    /// Of its PostgreSQL.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.host.address, self.port)
    }

    /// Of its endpoint's read-write port.
    pub fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.host.address, self.endpoint_port)
    }

    pub fn write_files(&self, owner: &Owner, common: &Common) -> Result<(), DemoError> {
        let make = |path: &Path| {
            fs::create_dir_all(path).map_err(|e| DemoError::failed(format!("make {}", path.display()), e))
        };
        make(&self.directory)?;
        make(&self.directory.join("state"))?;
        // The parent of the data directory and the socket's belong to PostgreSQL: data are renamed and made there.
        owner.make(&self.directory.join("pg"), 0o755)?;
        owner.make(&self.directory.join("run"), 0o755)?;
        self.write("superuser.password", SUPERUSER_PASSWORD)?;
        self.write("internal.password", INTERNAL_PASSWORD)?;
        self.write("pgvigil.toml", &self.toml(owner, common))
    }

    fn write(&self, name: &str, text: &str) -> Result<(), DemoError> {
        let path = self.directory.join(name);
        let written =
            fs::write(&path, text).and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)));
        written.map_err(|error| DemoError::failed(format!("write {}", path.display()), error))
    }

    fn toml(&self, owner: &Owner, common: &Common) -> String {
        let at = |name: &str| format!("{:?}", self.directory.join(name));
        let mut text = format!(
            "cluster = {:?}\nname = {:?}\nstate_dir = {}\ndurability = {:?}\n",
            common.cluster,
            self.name,
            at("state"),
            common.durability
        );
        for (name, host, port, api_port) in &common.members {
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n[[members]]\nname = {name:?}\nhost = \"{host}\"\nport = {port}\napi_port = {api_port}\n"
            );
        }
        let _ = write!(
            text,
            "\n[etcd]\nendpoints = {:?}\ntry_timeout = {:?}\n\n[lease]\n{}\n\n[postgresql]\ndata_dir = {}\nos_user = {:?}\nlisten = \"{}\"\n\
             socket_dir = {}\nsuperuser_password_file = {}\ninternal_password_file = {}\n\
             hba = [\"host all all {} scram-sha-256\"]\n\n[postgresql.parameters]\n{}\n\n[api]\n\
             listen = \"{}:{}\"\n\n[log]\nlevel = {:?}\n",
            common.etcd,
            common.etcd_try_timeout,
            common.lease,
            at("pg/data"),
            owner.name,
            self.host.listen,
            at("run"),
            at("superuser.password"),
            at("internal.password"),
            self.host.clients,
            common.parameters,
            self.host.address,
            self.api_port,
            common.log_level,
        );
        if let Some(lines) = &common.endpoint {
            let (host, port, read_only) = (self.host.address, self.endpoint_port, self.read_only_port);
            let _ = write!(
                text,
                "\n[endpoint]\nlisten = [\"{host}:{port}\"]\nlisten_read_only = [\"{host}:{read_only}\"]\n{lines}\n"
            );
        }
        text
    }

    // === The agent ===

    pub fn start_agent(&mut self, binary: &Path) -> Result<(), DemoError> {
        if self.agent.as_mut().is_some_and(|agent| agent.ended().is_none()) {
            return Ok(());
        }
        let arguments = ["agent".into(), "--config".into(), self.config_file().into()];
        let name = format!("agent {}", self.name);
        self.agent = Some(Process::spawn(&name, &self.host, binary, &arguments, &self.directory, &self.agent_log())?);
        Ok(())
    }

    pub fn agent(&mut self) -> Option<&mut Process> {
        self.agent.as_mut()
    }

    pub fn agent_pid(&self) -> Option<i32> {
        self.agent.as_ref().and_then(Process::pid)
    }

    /// How the agent ended, when it did by itself.
    pub fn agent_ended(&mut self) -> Option<String> {
        self.agent.as_mut().and_then(Process::ended)
    }

    pub fn signal_agent(&self, signal: Signal) {
        if let Some(agent) = &self.agent {
            agent.signal(signal);
        }
    }

    pub fn postmaster(&self) -> Option<i32> {
        processes::postmaster(&self.data_dir())
    }

    /// Every process of this member: agent, guardian, PostgreSQL.
    pub fn processes(&self) -> Vec<i32> {
        processes::under(&self.directory)
    }

    /// The agent's last lines that a person should read.
    pub fn complaints(&self, most: usize) -> Vec<String> {
        let text = fs::read_to_string(self.agent_log()).unwrap_or_default();
        let serious = |line: &&str| line.contains("ERROR") || line.contains("WARN") || line.contains("panicked");
        let mut lines: Vec<String> = text.lines().rev().filter(serious).take(most).map(str::to_owned).collect();
        lines.reverse();
        lines
    }
}
