//! Which consumer a session belongs to. First match wins: certificate; router; registration by address, user or name
//! (`application_name`); a name that the same address has used; else user, database and address.
//!
//! Names are labels that clients give themselves, after they have shown who they are: two regions with the same role could
//! take each other's. Where that matters, register by address or certificate.

use std::collections::HashMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::config::access::AddressPattern;
use crate::core::budget::{Class, ConsumerId, Share};

/// MAAS's own names: `maas-regiond-<id>` (Django) and `maas-temporal-<id>`; its other components give none.
const REGION_NAMES: [&str; 2] = ["maas-regiond-", "maas-temporal-"];
/// Addresses whose names are remembered; beyond it the longest unused is forgotten.
const MOST_ADDRESSES: usize = 4096;

/// A consumer that somebody has named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consumer {
    pub id: ConsumerId,
    #[serde(default)]
    pub class: Class,
    /// `None`: its class's.
    #[serde(default)]
    pub guaranteed: Option<u32>,
    #[serde(default)]
    pub limit: Option<u32>,
    /// Any of these is enough; one with none of them is known by its id as certificate or router name only.
    #[serde(default)]
    pub addresses: Vec<AddressPattern>,
    #[serde(default)]
    pub users: Vec<String>,
    /// Exact, or with a `*` at the end.
    #[serde(default)]
    pub application_names: Vec<String>,
}

impl Consumer {
    pub fn share(&self) -> Share {
        Share { guaranteed: self.guaranteed.unwrap_or_else(|| self.class.guaranteed()), limit: self.limit }
    }
}

/// What is known of a session when it asks for a place.
#[derive(Clone, Copy, Debug)]
pub struct Session<'a> {
    /// Name in a verified certificate.
    pub certificate: Option<&'a str>,
    /// Name of the router that it came through.
    pub router: Option<&'a str>,
    pub address: Option<IpAddr>,
    pub user: &'a str,
    pub database: &'a str,
    pub application_name: &'a str,
}

#[derive(Debug, Default)]
pub struct Recogniser {
    registered: Vec<Consumer>,
    learned: HashMap<IpAddr, Learned>,
    /// Counts sessions, so that "longest unused" has a meaning.
    clock: u64,
}

#[derive(Debug)]
struct Learned {
    region: String,
    /// More than one region speaks from here (a common router, NAT): its nameless sessions are nobody's.
    ambiguous: bool,
    used: u64,
}

/// The answer, and whether the consumer has been named by somebody or only by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognised {
    pub id: ConsumerId,
    pub class: Class,
    pub by: By,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    Certificate,
    Router,
    Address,
    User,
    ApplicationName,
    /// A name that its address has used.
    Learned,
    /// Nothing but where it comes from.
    Bucket,
}

impl Recogniser {
    pub fn register(&mut self, consumers: Vec<Consumer>) {
        self.registered = consumers;
    }

    pub fn registered(&self) -> &[Consumer] {
        &self.registered
    }

    pub fn recognise(&mut self, session: &Session<'_>) -> Recognised {
        let address = session.address.map(|address| address.to_canonical());
        let region = region_of(session.application_name);
        if let (Some(address), Some(region)) = (address, region) {
            self.learn(address, region);
        }
        // Proven names first; whoever bears one need not be registered to be counted under it.
        for (name, by) in [(session.certificate, By::Certificate), (session.router, By::Router)] {
            if let Some(name) = name {
                return self.named(name, by);
            }
        }
        type Matches<'a> = &'a dyn Fn(&Consumer) -> bool;
        let by_registration: [(By, Matches<'_>); 3] = [
            (By::Address, &|c| address.is_some_and(|_| c.addresses.iter().any(|pattern| pattern.matches(address)))),
            (By::User, &|c| c.users.iter().any(|user| user == session.user)),
            (By::ApplicationName, &|c| c.application_names.iter().any(|p| name_matches(p, session.application_name))),
        ];
        for (by, matches) in by_registration {
            if let Some(consumer) = self.registered.iter().find(|consumer| matches(consumer)) {
                return Recognised { id: consumer.id.clone(), class: consumer.class, by };
            }
        }
        if let Some(region) = region {
            return self.region(region, By::ApplicationName);
        }
        let learned = address.and_then(|address| self.learned.get_mut(&address)).filter(|learned| !learned.ambiguous);
        if let Some(learned) = learned.filter(|_| session.application_name.is_empty()) {
            self.clock += 1;
            learned.used = self.clock;
            let region = learned.region.clone();
            return self.region(&region, By::Learned);
        }
        let place = address.map_or_else(|| "local".to_owned(), |address| address.to_string());
        let id = ConsumerId(format!("{}/{}@{place}", session.user, session.database));
        Recognised { id, class: Class::Other, by: By::Bucket }
    }

    fn named(&self, name: &str, by: By) -> Recognised {
        let class = self.registered.iter().find(|consumer| consumer.id.0 == name).map(|consumer| consumer.class);
        Recognised { id: ConsumerId(name.to_owned()), class: class.unwrap_or_default(), by }
    }

    /// A region that gave its own name: the registered one of that id, else one made up for it.
    fn region(&self, region: &str, by: By) -> Recognised {
        let known = self.registered.iter().find(|consumer| consumer.id.0 == region);
        let (id, class) = match known {
            Some(consumer) => (consumer.id.clone(), consumer.class),
            None => (ConsumerId(format!("region:{region}")), Class::Region),
        };
        Recognised { id, class, by }
    }

    fn learn(&mut self, address: IpAddr, region: &str) {
        self.clock += 1;
        if let Some(learned) = self.learned.get_mut(&address) {
            learned.used = self.clock;
            learned.ambiguous |= learned.region != region;
            return;
        }
        if self.learned.len() >= MOST_ADDRESSES
            && let Some(oldest) = self.learned.iter().min_by_key(|(_, learned)| learned.used).map(|(at, _)| *at)
        {
            self.learned.remove(&oldest);
        }
        self.learned.insert(address, Learned { region: region.to_owned(), ambiguous: false, used: self.clock });
    }
}

/// The id in `maas-regiond-<id>` or `maas-temporal-<id>`.
fn region_of(application_name: &str) -> Option<&str> {
    let id = REGION_NAMES.iter().find_map(|prefix| application_name.strip_prefix(prefix))?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
    (!id.is_empty() && id.len() <= 64 && id.chars().all(plain)).then_some(id)
}

fn name_matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAAS: Session<'_> = Session {
        certificate: None,
        router: None,
        address: Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1))),
        user: "maas",
        database: "maasdb",
        application_name: "",
    };

    fn at(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    fn consumer(id: &str) -> Consumer {
        Consumer {
            id: ConsumerId(id.into()),
            class: Class::Region,
            guaranteed: None,
            limit: None,
            addresses: Vec::new(),
            users: Vec::new(),
            application_names: Vec::new(),
        }
    }

    fn who(recogniser: &mut Recogniser, session: Session<'_>) -> (String, By) {
        let found = recogniser.recognise(&session);
        (found.id.0, found.by)
    }

    #[test]
    fn the_first_that_matches_wins() {
        let mut recogniser = Recogniser::default();
        recogniser.register(vec![
            Consumer { application_names: vec!["maas-regiond-*".into()], ..consumer("by-name") },
            Consumer { users: vec!["maas".into()], ..consumer("by-user") },
            Consumer { addresses: vec!["10.0.0.1".parse().unwrap()], ..consumer("by-address") },
        ]);
        let all = Session {
            certificate: Some("by-certificate"),
            router: Some("by-router"),
            application_name: "maas-regiond-x",
            ..MAAS
        };
        let mut is = |session, id: &str, by| assert_eq!(who(&mut recogniser, session), (id.to_owned(), by));
        is(all, "by-certificate", By::Certificate);
        is(Session { certificate: None, ..all }, "by-router", By::Router);
        let unproven = Session { certificate: None, router: None, ..all };
        is(unproven, "by-address", By::Address);
        is(Session { address: at(2), ..unproven }, "by-user", By::User);
        is(Session { address: at(2), user: "other", ..unproven }, "by-name", By::ApplicationName);
    }

    #[test]
    fn a_region_is_known_by_the_names_that_maas_gives_and_covers_its_nameless_sessions() {
        let mut recogniser = Recogniser::default();
        let named = |name, last| Session { application_name: name, address: at(last), ..MAAS };
        assert_eq!(who(&mut recogniser, MAAS), ("maas/maasdb@10.0.0.1".into(), By::Bucket), "nothing is known yet");
        assert_eq!(who(&mut recogniser, named("maas-regiond-abc", 1)), ("region:abc".into(), By::ApplicationName));
        assert_eq!(who(&mut recogniser, named("maas-temporal-abc", 1)), ("region:abc".into(), By::ApplicationName));
        assert_eq!(who(&mut recogniser, MAAS), ("region:abc".into(), By::Learned));
        assert_eq!(who(&mut recogniser, named("psql", 1)).1, By::Bucket, "psql on the region's host is not the region");
        assert_eq!(who(&mut recogniser, named("", 2)).1, By::Bucket, "another address");
        let mapped = Session { address: Some("::ffff:10.0.0.1".parse().unwrap()), ..MAAS };
        assert_eq!(who(&mut recogniser, mapped).1, By::Learned);
    }

    #[test]
    fn an_address_of_two_regions_teaches_nothing() {
        let mut recogniser = Recogniser::default();
        for name in ["maas-regiond-a", "maas-regiond-b", "maas-regiond-a"] {
            recogniser.recognise(&Session { application_name: name, ..MAAS });
        }
        assert_eq!(who(&mut recogniser, MAAS).1, By::Bucket);
    }

    #[test]
    fn names_that_are_none_are_not_taken() {
        for name in [
            "maas-regiond-",
            "maas-regiond-a b",
            "maas-regiond-a\u{e9}",
            "xmaas-regiond-a",
            &format!("maas-regiond-{}", "x".repeat(65)),
        ] {
            let mut recogniser = Recogniser::default();
            assert_eq!(who(&mut recogniser, Session { application_name: name, ..MAAS }).1, By::Bucket, "{name}");
        }
    }

    #[test]
    fn a_registered_region_is_found_by_its_own_name() {
        let mut recogniser = Recogniser::default();
        recogniser.register(vec![Consumer { limit: Some(60), ..consumer("abc") }]);
        let named = Session { application_name: "maas-regiond-abc", ..MAAS };
        assert_eq!(who(&mut recogniser, named), ("abc".into(), By::ApplicationName));
        assert_eq!(recogniser.registered()[0].share(), Share { guaranteed: 40, limit: Some(60) });
    }

    #[test]
    fn what_is_learned_is_bounded() {
        let mut recogniser = Recogniser::default();
        for n in 0..MOST_ADDRESSES as u32 + 10 {
            let address = Some(IpAddr::from(std::net::Ipv4Addr::from_bits(n)));
            recogniser.recognise(&Session { application_name: "maas-regiond-a", address, ..MAAS });
        }
        assert_eq!(recogniser.learned.len(), MOST_ADDRESSES);
        assert!(!recogniser.learned.contains_key(&IpAddr::from([0, 0, 0, 0])), "the longest unused is forgotten");
    }
}
