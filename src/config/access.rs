//! Who may come in through the endpoint, as the file says it: the words, read and checked. The first rule that matches
//! decides, as in pg_hba.conf; `endpoint/auth/rules.rs` applies them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One `[[endpoint.allow]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessRule {
    pub user: UserPattern,
    pub database: DatabasePattern,
    pub address: AddressPattern,
    /// The client has to speak TLS.
    pub tls: bool,
    pub method: AccessMethod,
    pub client_cert: ClientCert,
}

impl Default for AccessRule {
    /// What counts where no rule is written, and for each key that a rule leaves away.
    fn default() -> AccessRule {
        AccessRule {
            user: UserPattern::All,
            database: DatabasePattern::All,
            address: AddressPattern::All,
            tls: false,
            method: AccessMethod::Scram,
            client_cert: ClientCert::None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UserPattern {
    /// Every role that is no superuser.
    All,
    Name(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DatabasePattern {
    /// Every database; not physical replication.
    All,
    /// The database called like the user.
    SameUser,
    /// Physical replication, which has no database.
    Replication,
    Name(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressPattern {
    All,
    /// This host: 127.0.0.0/8, ::1, and Unix sockets.
    Loopback,
    Network {
        address: IpAddr,
        prefix: u8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessMethod {
    /// A password, proven by SCRAM-SHA-256.
    Scram,
    /// A client certificate whose name is the user's.
    Cert,
    Reject,
}

/// Beside SCRAM, as pg_hba.conf's `clientcert`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientCert {
    None,
    /// Signed by `endpoint.tls.client_ca_file`.
    VerifyCa,
    /// And its name is the user's.
    VerifyFull,
}

impl From<&str> for UserPattern {
    fn from(text: &str) -> UserPattern {
        match text {
            "all" => UserPattern::All,
            name => UserPattern::Name(name.to_owned()),
        }
    }
}

impl From<&str> for DatabasePattern {
    fn from(text: &str) -> DatabasePattern {
        match text {
            "all" => DatabasePattern::All,
            "sameuser" => DatabasePattern::SameUser,
            "replication" => DatabasePattern::Replication,
            name => DatabasePattern::Name(name.to_owned()),
        }
    }
}

impl FromStr for AddressPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<AddressPattern, String> {
        match text {
            "all" => return Ok(AddressPattern::All),
            "loopback" => return Ok(AddressPattern::Loopback),
            _ => {}
        }
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| format!("`{address}` is not an IP address"))?;
        let whole = bits(address);
        let prefix = match prefix {
            None => whole,
            Some(text) => text
                .parse()
                .ok()
                .filter(|prefix| *prefix <= whole)
                .ok_or_else(|| format!("/{text} is not a length of 0 to {whole} bits"))?,
        };
        let network = masked(address, prefix);
        if network != address {
            // Almost always a slip of the pen, and wider than was meant.
            return Err(format!("`{text}` has bits set beyond its prefix; the network is {network}/{prefix}"));
        }
        Ok(AddressPattern::Network { address, prefix })
    }
}

impl AddressPattern {
    /// `None`: a Unix socket.
    pub fn matches(&self, client: Option<IpAddr>) -> bool {
        // An IPv4 client on an IPv6 socket is an IPv4 client.
        let client = client.map(|address| address.to_canonical());
        match (self, client) {
            (AddressPattern::All, _) | (AddressPattern::Loopback, None) => true,
            (AddressPattern::Loopback, Some(client)) => client.is_loopback(),
            (AddressPattern::Network { .. }, None) => false,
            (AddressPattern::Network { address, prefix }, Some(client)) => {
                address.is_ipv4() == client.is_ipv4() && masked(client, *prefix) == *address
            }
        }
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

// === As it is written in the file ===

impl fmt::Display for UserPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            UserPattern::All => "all",
            UserPattern::Name(name) => name,
        })
    }
}

impl fmt::Display for DatabasePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DatabasePattern::All => "all",
            DatabasePattern::SameUser => "sameuser",
            DatabasePattern::Replication => "replication",
            DatabasePattern::Name(name) => name,
        })
    }
}

impl fmt::Display for AddressPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AddressPattern::All => f.write_str("all"),
            AddressPattern::Loopback => f.write_str("loopback"),
            AddressPattern::Network { address, prefix } => write!(f, "{address}/{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_match_as_in_pg_hba() {
        let matches = |pattern: &str, client: &str| {
            pattern.parse::<AddressPattern>().unwrap().matches(Some(client.parse().unwrap()))
        };
        assert!(matches("10.0.0.0/8", "10.9.8.7") && !matches("10.0.0.0/8", "11.0.0.1"));
        assert!(matches("10.0.0.1", "10.0.0.1") && !matches("10.0.0.1", "10.0.0.2"));
        assert!(matches("10.0.0.0/8", "::ffff:10.0.0.1"), "an IPv4 client on an IPv6 socket");
        assert!(matches("0.0.0.0/0", "1.2.3.4") && !matches("0.0.0.0/0", "::1"));
        assert!(matches("::/0", "2001:db8::1") && matches("2001:db8::/32", "2001:db8::1"));
        assert!(matches("loopback", "127.8.0.1") && matches("loopback", "::1") && !matches("loopback", "10.0.0.1"));
        assert!(matches("all", "1.2.3.4"));
        let socket = |pattern: &str| pattern.parse::<AddressPattern>().unwrap().matches(None);
        assert!(socket("all") && socket("loopback") && !socket("0.0.0.0/0"));
    }

    #[test]
    fn addresses_that_are_none_are_refused_with_what_was_meant() {
        let error = |text: &str| text.parse::<AddressPattern>().unwrap_err();
        assert!(error("10.0.0.1/8").contains("the network is 10.0.0.0/8"));
        assert!(error("10.0.0.0/33").contains("0 to 32"));
        assert!(error("region-a").contains("not an IP address"));
        assert!(error("10.0.0.0/").contains("0 to 32"));
    }
}
