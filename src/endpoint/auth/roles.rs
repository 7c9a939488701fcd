//! Who may log in, as PostgreSQL's `pg_authid` says: one snapshot of it, and how it travels to a router.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::verifier::{DEFAULT_ITERATIONS, StoredPassword};

/// A role as it travels: columns of `sql/login_roles.sql`. The verifier is a secret: never shown, never logged.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleRecord {
    pub name: String,
    /// `rolpassword` as it is stored.
    pub stored: Option<String>,
    /// `rolvaliduntil`, milliseconds since 1970; `None`: for ever.
    pub valid_until_ms: Option<i64>,
    pub can_login: bool,
    pub superuser: bool,
}

impl fmt::Debug for RoleRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RoleRecord")
            .field("name", &self.name)
            .field("stored", &self.stored.as_ref().map(|_| "(secret)"))
            .field("valid_until_ms", &self.valid_until_ms)
            .field("can_login", &self.can_login)
            .field("superuser", &self.superuser)
            .finish()
    }
}

#[derive(Clone, Debug)]
pub struct Role {
    pub password: StoredPassword,
    valid_until_ms: Option<i64>,
    pub can_login: bool,
    pub superuser: bool,
}

impl Role {
    pub fn expired(&self, unix_ms: u64) -> bool {
        // As PostgreSQL: refused once the moment has passed.
        self.valid_until_ms.is_some_and(|until| i128::from(until) < i128::from(unix_ms))
    }
}

/// All roles at one moment.
#[derive(Clone, Debug, Default)]
pub struct Roles {
    roles: HashMap<String, Role>,
    /// What most verifiers have: a mock exchange must not stand out.
    pub usual_iterations: u32,
    /// Login roles whose password is not of the kind that can be used here; for the log and for `GET /v1/endpoint`.
    pub md5: Vec<String>,
}

impl Roles {
    pub fn new(records: Vec<RoleRecord>) -> Roles {
        let mut counts: HashMap<u32, usize> = HashMap::new();
        let mut md5 = Vec::new();
        let mut roles = HashMap::with_capacity(records.len());
        for record in records {
            let password = StoredPassword::read(record.stored.as_deref());
            match &password {
                StoredPassword::Scram(verifier) => *counts.entry(verifier.iterations).or_default() += 1,
                StoredPassword::Md5 if record.can_login => md5.push(record.name.clone()),
                StoredPassword::Md5 | StoredPassword::None | StoredPassword::Unreadable => {}
            }
            let RoleRecord { name, valid_until_ms, can_login, superuser, stored: _ } = record;
            roles.insert(name, Role { password, valid_until_ms, can_login, superuser });
        }
        let usual = counts.into_iter().max_by_key(|(iterations, count)| (*count, *iterations));
        md5.sort();
        Roles { roles, usual_iterations: usual.map_or(DEFAULT_ITERATIONS, |(iterations, _)| iterations), md5 }
    }

    pub fn get(&self, name: &str) -> Option<&Role> {
        self.roles.get(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, stored: Option<&str>) -> RoleRecord {
        RoleRecord {
            name: name.into(),
            stored: stored.map(str::to_owned),
            valid_until_ms: None,
            can_login: true,
            superuser: false,
        }
    }

    #[test]
    fn a_record_shows_no_verifier() {
        let shown = format!("{:?}", record("maas", Some("SCRAM-SHA-256$…")));
        assert!(!shown.contains("SCRAM") && shown.contains("(secret)"), "{shown}");
    }

    #[test]
    fn the_usual_number_of_iterations_is_what_most_roles_have() {
        let scram = |iterations: u32| {
            let key = "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=";
            format!("SCRAM-SHA-256${iterations}:W22ZaJ0SNY7soEsUEjb6gQ==${key}:{key}")
        };
        assert_eq!(Roles::new(Vec::new()).usual_iterations, 4096);
        let records = [9000, 600_000, 600_000].map(|n| record(&n.to_string(), Some(&scram(n))));
        assert_eq!(Roles::new(records.to_vec()).usual_iterations, 600_000);
    }

    #[test]
    fn roles_with_md5_passwords_are_listed() {
        let roles = Roles::new(vec![record("b", Some("md53175bce1d3201d16594cebf9d7eb3f9d")), record("a", None)]);
        assert_eq!(roles.md5, ["b"]);
    }

    #[test]
    fn a_password_is_good_until_its_moment_has_passed() {
        let until =
            |ms| Roles::new(vec![RoleRecord { valid_until_ms: ms, ..record("a", None) }]).get("a").unwrap().clone();
        assert!(!until(None).expired(u64::MAX));
        assert!(!until(Some(1000)).expired(1000));
        assert!(until(Some(1000)).expired(1001));
        assert!(until(Some(i64::MIN)).expired(0), "-infinity");
    }
}
