//! Who is who: validated names, and the incarnation that tells one life of a data directory from the next.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest member or cluster name. `<member>_<incarnation>_<term>` has to fit PostgreSQL's 63-byte identifiers:
/// 26 + 1 + 16 + 1 + 19 = 63.
pub const MAX_NAME: usize = 26;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a valid name: 1 to {MAX_NAME} characters, lower-case letters, digits and hyphens, beginning with a letter"
)]
pub struct InvalidName(pub String);

fn validate(text: &str) -> Result<(), InvalidName> {
    let first_is_letter = text.starts_with(|c: char| c.is_ascii_lowercase());
    let rest_is_plain = text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if first_is_letter && rest_is_plain && text.len() <= MAX_NAME { Ok(()) } else { Err(InvalidName(text.to_owned())) }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidName> {
                let text = text.into();
                validate(&text)?;
                Ok(Self(text))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

name_type! {
    /// One PostgreSQL data directory with the agent that looks after it.
    MemberName
}
name_type! {
    /// The cluster, as operators call it; part of every key in the store.
    ClusterName
}

impl MemberName {
    /// The physical replication slot that this member streams through, on whichever member it follows.
    /// Hyphens are not allowed in slot names; underscores not in ours, so no two members share a slot.
    pub fn slot(&self) -> String {
        format!("pgvigil_{}", self.0.replace('-', "_"))
    }
}

/// One life of a member's data directory: a random number kept with its promises. Whoever's data were cloned, rewound,
/// restored or lost is another incarnation, whose seal proves nothing for the old one (protocol §0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Incarnation {
    type Err = InvalidIncarnation;

    fn from_str(text: &str) -> Result<Self, InvalidIncarnation> {
        let invalid = || InvalidIncarnation(text.to_owned());
        if text.len() != 16 {
            return Err(invalid());
        }
        u64::from_str_radix(text, 16).map(Incarnation).map_err(|_| invalid())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an incarnation: sixteen hexadecimal digits")]
pub struct InvalidIncarnation(pub String);

impl TryFrom<String> for Incarnation {
    type Error = InvalidIncarnation;

    fn try_from(text: String) -> Result<Self, InvalidIncarnation> {
        text.parse()
    }
}

impl From<Incarnation> for String {
    fn from(incarnation: Incarnation) -> String {
        incarnation.to_string()
    }
}

/// A member in one incarnation: what claims, seals and promises speak of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemberId {
    pub name: MemberName,
    pub incarnation: Incarnation,
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.name, self.incarnation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_postgresql_and_etcd() {
        for good in ["a", "node-a", "n1", &"a".repeat(MAX_NAME)] {
            assert!(MemberName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "A", "1a", "a_b", "a.b", "a/b", "ä", &"a".repeat(MAX_NAME + 1)] {
            assert!(MemberName::new(bad).is_err(), "{bad}");
        }
        assert_eq!(MemberName::new("node-a").unwrap().slot(), "pgvigil_node_a");
    }
}
