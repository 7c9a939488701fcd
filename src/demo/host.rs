//! Where a member of the cluster or of etcd runs. Loopback, unless somebody makes hosts of their own (network namespaces).

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

#[derive(Clone, Debug)]
pub struct Host {
    pub address: IpAddr,
    /// The command that brings a program there, which then takes its place (`nsenter --net=…`); empty: started directly.
    pub through: Vec<OsString>,
    /// `listen_addresses` there.
    pub listen: String,
    /// From where clients come, as pg_hba.conf says it.
    pub clients: String,
}

impl Default for Host {
    fn default() -> Host {
        Host {
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            through: Vec::new(),
            listen: Ipv4Addr::LOCALHOST.to_string(),
            clients: "127.0.0.1/32".to_owned(),
        }
    }
}

impl Host {
    /// Program and arguments that start `program` there.
    pub(super) fn command(&self, program: &Path, arguments: &[OsString]) -> (OsString, Vec<OsString>) {
        let mut words = self.through.iter().cloned().chain([program.into()]).chain(arguments.iter().cloned());
        let first = words.next().unwrap_or_else(|| program.into());
        (first, words.collect())
    }
}
