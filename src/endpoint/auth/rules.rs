//! Which rule of `endpoint.allow` is for a client, and what follows from it. Pure: no I/O, no clock.

use std::net::IpAddr;

use crate::config::access::{AccessMethod, AccessRule, ClientCert, DatabasePattern, UserPattern};

use super::Refusal;
use super::identity::ClientCertificate;

/// What a client says and shows before it has proven anything.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    pub user: &'a str,
    pub database: &'a str,
    /// Physical replication (`replication=true`); logical replication names a database and is like any client.
    pub replication: bool,
    /// `None`: a Unix socket.
    pub address: Option<IpAddr>,
    pub tls: bool,
    /// Verified: signed by an authority that clients are asked for.
    pub certificate: Option<&'a ClientCertificate>,
}

/// How the client has to prove itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    Scram,
    /// The certificate is the proof, and has been looked at.
    Certificate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Counted from 1, as people count the rules in the file.
    pub rule: usize,
    pub demand: Demand,
    /// The rule says the user's name; one that says `all` is not for superusers.
    pub names_user: bool,
}

pub fn admission(rules: &[AccessRule], claim: &Claim<'_>) -> Result<Admission, Refusal> {
    let found = rules.iter().enumerate().find(|(_, rule)| matches(rule, claim));
    let Some((index, rule)) = found else {
        return Err(refused(claim, "no rule of endpoint.allow for", "write one in pgvigil's configuration"));
    };
    let rule_number = index + 1;
    if rule.method == AccessMethod::Reject {
        return Err(refused(claim, &format!("rule {rule_number} of endpoint.allow rejects"), ""));
    }
    // Matched whether it speaks TLS or not: a rule that asks for it must not give way to a laxer one after it.
    if rule.tls && !claim.tls {
        let what = format!("rule {rule_number} of endpoint.allow asks for TLS of");
        return Err(refused(claim, &what, "connect with sslmode=require"));
    }
    let needs = if rule.method == AccessMethod::Cert { ClientCert::VerifyFull } else { rule.client_cert };
    match (needs, claim.certificate) {
        (ClientCert::None, _) | (ClientCert::VerifyCa, Some(_)) => {}
        (ClientCert::VerifyCa | ClientCert::VerifyFull, None) => {
            return Err(Refusal::new("28000", "connection requires a valid client certificate"));
        }
        (ClientCert::VerifyFull, Some(certificate)) if certificate.is_for(claim.user) => {}
        (ClientCert::VerifyFull, Some(certificate)) => {
            let message = format!("certificate authentication failed for user \"{}\"", claim.user);
            let detail = format!("The certificate is for {}.", certificate.shown());
            return Err(Refusal::new("28000", message).detail(detail));
        }
    }
    let demand = if rule.method == AccessMethod::Cert { Demand::Certificate } else { Demand::Scram };
    Ok(Admission { rule: rule_number, demand, names_user: matches!(rule.user, UserPattern::Name(_)) })
}

fn matches(rule: &AccessRule, claim: &Claim<'_>) -> bool {
    let user = match &rule.user {
        UserPattern::All => true,
        UserPattern::Name(name) => name == claim.user,
    };
    let database = match &rule.database {
        DatabasePattern::Replication => claim.replication,
        // Whoever may read every table and change every file by it has to be named.
        _ if claim.replication => false,
        DatabasePattern::All => true,
        DatabasePattern::SameUser => claim.database == claim.user,
        DatabasePattern::Name(name) => name == claim.database,
    };
    user && database && rule.address.matches(claim.address)
}

/// In the words of PostgreSQL's "no pg_hba.conf entry", which people know how to read.
fn refused(claim: &Claim<'_>, what: &str, remedy: &str) -> Refusal {
    let host = claim.address.map_or_else(|| "[local]".to_owned(), |address| address.to_canonical().to_string());
    let database = if claim.replication {
        "replication connection".to_owned()
    } else {
        format!("database \"{}\"", claim.database)
    };
    let encryption = if claim.tls { "TLS" } else { "no encryption" };
    let message = format!("{what} host \"{host}\", user \"{}\", {database}, {encryption}", claim.user);
    let refusal = Refusal::new("28000", message);
    if remedy.is_empty() { refusal } else { refusal.hint(remedy) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(user: &str, database: &str, address: &str) -> AccessRule {
        AccessRule {
            user: user.into(),
            database: database.into(),
            address: address.parse().unwrap(),
            ..AccessRule::default()
        }
    }

    const MAAS: Claim<'_> = Claim {
        user: "maas",
        database: "maasdb",
        replication: false,
        address: Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1))),
        tls: false,
        certificate: None,
    };

    fn message(rules: &[AccessRule], claim: &Claim<'_>) -> String {
        let refusal = admission(rules, claim).unwrap_err();
        assert_eq!(refusal.sqlstate, "28000");
        refusal.message
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let reject = AccessRule { method: AccessMethod::Reject, ..rule("maas", "all", "10.0.0.0/8") };
        let rules = [rule("maas", "other", "all"), rule("eve", "all", "all"), reject, AccessRule::default()];
        assert_eq!(
            message(&rules, &MAAS),
            "rule 3 of endpoint.allow rejects host \"10.0.0.1\", user \"maas\", database \"maasdb\", no encryption"
        );
        let elsewhere = Claim { address: Some("11.0.0.1".parse().unwrap()), ..MAAS };
        assert_eq!(admission(&rules, &elsewhere).unwrap().rule, 4);
    }

    #[test]
    fn nobody_comes_in_without_a_rule() {
        assert!(message(&[], &MAAS).starts_with("no rule of endpoint.allow for host"));
        assert!(message(&[rule("all", "sameuser", "all")], &MAAS).contains("no rule"));
        assert!(admission(&[rule("all", "sameuser", "all")], &Claim { database: "maas", ..MAAS }).is_ok());
        let socket = Claim { address: None, ..MAAS };
        assert!(message(&[rule("all", "all", "10.0.0.0/8")], &socket).contains("host \"[local]\""));
    }

    #[test]
    fn replication_has_to_be_named() {
        let claim = Claim { replication: true, database: "", ..MAAS };
        assert!(message(&[AccessRule::default()], &claim).contains("replication connection"));
        assert!(admission(&[rule("all", "replication", "all")], &claim).is_ok());
        assert!(admission(&[rule("all", "replication", "all")], &Claim { database: "replication", ..MAAS }).is_err());
    }

    /// Unlike hostssl, which lets a client without TLS go on to the next line.
    #[test]
    fn a_rule_that_asks_for_tls_does_not_give_way_to_a_laxer_one() {
        let rules = [AccessRule { tls: true, ..AccessRule::default() }, AccessRule::default()];
        assert!(message(&rules, &MAAS).starts_with("rule 1 of endpoint.allow asks for TLS of"));
        assert_eq!(admission(&rules, &Claim { tls: true, ..MAAS }).unwrap().rule, 1);
    }

    #[test]
    fn certificates_are_asked_for_as_in_pg_hba() {
        let certificate = |name: &str| ClientCertificate { common_name: Some(name.into()), ..Default::default() };
        let (maas, eve) = (certificate("maas"), certificate("eve"));
        let with = |method, client_cert| [AccessRule { tls: true, method, client_cert, ..AccessRule::default() }];
        let ask = |rules: &[AccessRule], certificate| admission(rules, &Claim { tls: true, certificate, ..MAAS });

        for rules in [with(AccessMethod::Cert, ClientCert::None), with(AccessMethod::Scram, ClientCert::VerifyFull)] {
            assert!(ask(&rules, None).is_err());
            assert!(ask(&rules, Some(&eve)).is_err());
            assert!(ask(&rules, Some(&maas)).is_ok());
        }
        assert_eq!(ask(&with(AccessMethod::Cert, ClientCert::None), Some(&maas)).unwrap().demand, Demand::Certificate);
        let verify_ca = with(AccessMethod::Scram, ClientCert::VerifyCa);
        assert_eq!(ask(&verify_ca, Some(&eve)).unwrap().demand, Demand::Scram);
        assert!(ask(&verify_ca, None).is_err());
    }
}
