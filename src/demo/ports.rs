//! Free ports on loopback that stay ours: two clusters that start at the same time never choose the same one.

use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use super::DemoError;

/// Below the ephemeral range (32768 and up), so that no outgoing connection takes one between our look and our use.
const FIRST: u16 = 20_000;
const LAST: u16 = 32_000;

/// A port, reserved until dropped: an abstract Unix socket of that name belongs to one process at a time, leaves no file,
/// and goes with its process.
pub struct Port {
    pub number: u16,
    _claim: UnixListener,
}

pub fn free(count: usize) -> Result<Vec<Port>, DemoError> {
    let span = LAST - FIRST;
    let mut seed = [0_u8; 2];
    getrandom::fill(&mut seed).map_err(|error| DemoError::failed("choose ports", error))?;
    let start = u16::from_le_bytes(seed) % span;
    let ports: Vec<Port> =
        (0..span).filter_map(|offset| reserve(FIRST + (start + offset) % span)).take(count).collect();
    if ports.len() < count {
        return Err(DemoError::failed("choose ports", format!("fewer than {count} of {FIRST} to {LAST} are free")));
    }
    Ok(ports)
}

fn reserve(number: u16) -> Option<Port> {
    let name = SocketAddr::from_abstract_name(format!("pgvigil-port-{number}")).ok()?;
    let claim = UnixListener::bind_addr(&name).ok()?;
    TcpListener::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
    Some(Port { number, _claim: claim })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_port_is_not_given_out_again() {
        let held = free(3).unwrap();
        for port in &held {
            assert!(reserve(port.number).is_none());
        }
        let number = held[0].number;
        drop(held);
        assert!(reserve(number).is_some());
    }
}
