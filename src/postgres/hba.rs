//! pg_hba.conf and pg_ident.conf: who may come in, from where. The first line that matches decides, so pgvigil's come first.

use std::net::IpAddr;

use nix::unistd::{Uid, User};

use crate::config::Config;

use super::roles::{AGENT, REPLICATION, REWIND};

const MAP: &str = "pgvigil";

pub fn hba_file(config: &Config) -> String {
    let mut lines = vec![
        "# Written by pgvigil at each start and reload; changes here are lost.".to_owned(),
        "# Lines for clients belong into postgresql.hba of pgvigil's configuration.".to_owned(),
        "# The agent itself: on this host only.".to_owned(),
    ];
    // Peer needs no key derivation, which is most of the time that a new connection takes; the agent opens new ones while
    // it seals and promotes. It works where the agent's user has a name.
    let method = if agent_user().is_some() { format!("peer map={MAP}") } else { "scram-sha-256".to_owned() };
    lines.push(format!("local all,replication {AGENT} {method}"));
    lines.push(format!("host all,replication {AGENT} all reject"));
    lines.push("# Replication and rewind: from the members' addresses only.".to_owned());
    let mut addresses: Vec<String> = config.members.iter().flat_map(|member| addresses(&member.host)).collect();
    addresses.sort();
    addresses.dedup();
    for address in addresses {
        lines.push(format!("host replication {REPLICATION} {address} scram-sha-256"));
        lines.push(format!("host postgres {REWIND} {address} scram-sha-256"));
    }
    lines.push(format!("local all,replication {REPLICATION},{REWIND} reject"));
    lines.push(format!("host all,replication {REPLICATION},{REWIND} all reject"));
    if config.direct() {
        lines.push("# postgresql.hba".to_owned());
        lines.extend(config.postgresql.hba.iter().cloned());
        lines.push("# Whoever is on this host shows a password; nobody else comes in.".to_owned());
        lines.push("local all all scram-sha-256".to_owned());
        for address in loopback() {
            lines.push(format!("host all all {address} scram-sha-256"));
        }
    } else {
        lines.push(
            "# postgresql.hba, as far as it is not of clients on the network: those come through the endpoint."
                .to_owned(),
        );
        lines.extend(config.postgresql.hba.iter().filter(|line| through_socket_or_replication(line)).cloned());
        lines.push(
            "# The endpoint's clients, and whoever is on this host, show a password over the unix socket.".to_owned(),
        );
        lines.push("local all all scram-sha-256".to_owned());
        lines.push("host all all all reject".to_owned());
    }
    lines.push(String::new());
    lines.join("\n")
}

pub fn ident_file() -> String {
    let user = agent_user().unwrap_or_default();
    let line = if user.is_empty() { String::new() } else { format!("{MAP} \"{user}\" {AGENT}\n") };
    format!("# Written by pgvigil: the agent's operating system user is the role {AGENT}.\n{line}")
}

/// What is left of the operator's lines where clients come through the endpoint: the unix socket's, and tools that stream.
fn through_socket_or_replication(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let kind = words.next();
    kind == Some("local") || words.next().is_some_and(|databases| databases == "replication")
}

fn agent_user() -> Option<String> {
    User::from_uid(Uid::effective()).ok().flatten().map(|user| user.name).filter(|name| !name.contains('"'))
}

fn loopback() -> [String; 2] {
    ["127.0.0.1/32".to_owned(), "::1/128".to_owned()]
}

fn addresses(host: &str) -> Vec<String> {
    match host.parse::<IpAddr>() {
        Ok(address) if address.is_loopback() => {
            // Members on one host (a demo, a test) may use any of 127.0.0.0/8.
            let mut all = loopback().to_vec();
            all.push(format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }));
            all
        }
        Ok(IpAddr::V4(address)) => vec![format!("{address}/32")],
        Ok(IpAddr::V6(address)) => vec![format!("{address}/128")],
        Err(_) if host == "localhost" => loopback().to_vec(),
        Err(_) => vec![host.to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_become_the_narrowest_address() {
        assert_eq!(addresses("10.0.0.7"), ["10.0.0.7/32"]);
        assert_eq!(addresses("fd00::1"), ["fd00::1/128"]);
        assert_eq!(addresses("db1.example"), ["db1.example"]);
        assert_eq!(addresses("localhost"), ["127.0.0.1/32", "::1/128"]);
    }
}
