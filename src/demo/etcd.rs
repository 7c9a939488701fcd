//! The store's members: Debian's etcd on loopback ports, each with its log.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::ports::{self, Port};
use super::processes::Process;
use super::{DemoError, Host};

pub struct Etcd {
    program: PathBuf,
    base: PathBuf,
    pub members: Vec<EtcdMember>,
}

pub struct EtcdMember {
    pub name: String,
    pub host: Host,
    client: Port,
    peer: Port,
    process: Option<Process>,
}

impl Etcd {
    /// `hosts` in the members' order; loopback for those that have none.
    pub fn start(base: &Path, count: usize, hosts: &[Host]) -> Result<Etcd, DemoError> {
        let program = find("etcd").ok_or_else(|| DemoError::Missing {
            what: "etcd".to_owned(),
            remedy: "install etcd (Debian: `apt-get install etcd-server`), or let scripts/demo do it".to_owned(),
        })?;
        let mut free = ports::free(2 * count)?.into_iter();
        let members = (1..=count)
            .filter_map(|number| {
                let (client, peer) = (free.next()?, free.next()?);
                let host = hosts.get(number - 1).cloned().unwrap_or_default();
                Some(EtcdMember { name: format!("etcd-{number}"), host, client, peer, process: None })
            })
            .collect();
        let mut etcd = Etcd { program, base: base.to_owned(), members };
        for index in 0..count {
            etcd.start_member(index)?;
        }
        Ok(etcd)
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|m| m.url(&m.client)).collect()
    }

    /// `data` and `etcd.log` are in it.
    pub fn directory(&self, index: usize) -> PathBuf {
        self.base.join(&self.members[index].name)
    }

    /// A cluster that is restored from a backup needs the same one.
    pub fn token(&self) -> String {
        format!("pgvigil-{}", self.members[0].peer.number)
    }

    /// Never started, or not running any more.
    pub fn is_down(&mut self, index: usize) -> bool {
        self.members[index].process.as_mut().is_none_or(|process| process.ended().is_some())
    }

    pub fn pid(&self, index: usize) -> Option<i32> {
        self.members[index].process.as_ref().and_then(Process::pid)
    }

    /// Starts it for the first time, or again with the data that it has.
    pub fn start_member(&mut self, index: usize) -> Result<(), DemoError> {
        let cluster: Vec<String> = self.members.iter().map(|m| format!("{}={}", m.name, m.url(&m.peer))).collect();
        let member = &self.members[index];
        let url = |port: &Port| member.url(port);
        let directory = self.directory(index);
        std::fs::create_dir_all(&directory)
            .map_err(|error| DemoError::failed(format!("make {}", directory.display()), error))?;
        let options = [
            ("--name", member.name.clone()),
            ("--data-dir", directory.join("data").display().to_string()),
            ("--listen-client-urls", url(&member.client)),
            ("--advertise-client-urls", url(&member.client)),
            ("--listen-peer-urls", url(&member.peer)),
            ("--initial-advertise-peer-urls", url(&member.peer)),
            ("--initial-cluster", cluster.join(",")),
            ("--initial-cluster-token", self.token()),
            ("--initial-cluster-state", "new".to_owned()),
        ];
        let arguments: Vec<OsString> = options.iter().flat_map(|(name, value)| [name.into(), value.into()]).collect();
        let log = directory.join("etcd.log");
        let process = Process::spawn(&member.name, &member.host, &self.program, &arguments, &directory, &log)?;
        self.members[index].process = Some(process);
        Ok(())
    }

    pub fn signal(&self, index: usize, signal: Signal) {
        if let Some(process) = &self.members[index].process {
            process.signal(signal);
        }
    }

    pub async fn stop_member(&mut self, index: usize) {
        if let Some(mut process) = self.members[index].process.take() {
            process.signal(Signal::SIGCONT);
            process.signal(Signal::SIGTERM);
            if !process.wait(Duration::from_secs(5)).await {
                process.signal(Signal::SIGKILL);
                process.wait(Duration::from_secs(5)).await;
            }
        }
    }

    pub async fn stop(&mut self) {
        for index in 0..self.members.len() {
            self.stop_member(index).await;
        }
    }
}

impl EtcdMember {
    fn url(&self, port: &Port) -> String {
        format!("http://{}:{}", self.host.address, port.number)
    }

    pub fn peer_url(&self) -> String {
        self.url(&self.peer)
    }
}

/// A program on the PATH, or where Debian keeps servers.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    directories.extend(["/usr/bin", "/usr/sbin", "/usr/local/bin"].map(PathBuf::from));
    directories.into_iter().map(|directory| directory.join(program)).find(|file| file.is_file())
}
