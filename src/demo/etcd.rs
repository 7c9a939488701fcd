//! The store's members: Debian's etcd on loopback ports, each with its log.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::DemoError;
use super::ports::{self, Port};
use super::processes::Process;

pub struct Etcd {
    program: PathBuf,
    base: PathBuf,
    pub members: Vec<EtcdMember>,
}

pub struct EtcdMember {
    pub name: String,
    client: Port,
    peer: Port,
    process: Option<Process>,
}

impl Etcd {
    pub fn start(base: &Path, count: usize) -> Result<Etcd, DemoError> {
        let program = find("etcd").ok_or_else(|| DemoError::Missing {
            what: "etcd".to_owned(),
            remedy: "install etcd (Debian: `apt-get install etcd-server`), or let scripts/demo do it".to_owned(),
        })?;
        let mut free = ports::free(2 * count)?.into_iter();
        let members = (1..=count)
            .filter_map(|number| {
                let (client, peer) = (free.next()?, free.next()?);
                Some(EtcdMember { name: format!("etcd-{number}"), client, peer, process: None })
            })
            .collect();
        let mut etcd = Etcd { program, base: base.to_owned(), members };
        for index in 0..count {
            etcd.start_member(index)?;
        }
        Ok(etcd)
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|m| format!("http://127.0.0.1:{}", m.client.number)).collect()
    }

    /// Starts it for the first time, or again with the data that it has.
    pub fn start_member(&mut self, index: usize) -> Result<(), DemoError> {
        let url = |port: &Port| format!("http://127.0.0.1:{}", port.number);
        let cluster: Vec<String> = self.members.iter().map(|m| format!("{}={}", m.name, url(&m.peer))).collect();
        let member = &self.members[index];
        let directory = self.base.join(&member.name);
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
            ("--initial-cluster-token", format!("pgvigil-{}", self.members[0].peer.number)),
            ("--initial-cluster-state", "new".to_owned()),
        ];
        let arguments: Vec<OsString> = options.iter().flat_map(|(name, value)| [name.into(), value.into()]).collect();
        let log = directory.join("etcd.log");
        let process = Process::spawn(&member.name, &self.program, &arguments, &[], &directory, &log)?;
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

/// A program on the PATH, or where Debian keeps servers.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    directories.extend(["/usr/bin", "/usr/sbin", "/usr/local/bin"].map(PathBuf::from));
    directories.into_iter().map(|directory| directory.join(program)).find(|file| file.is_file())
}
