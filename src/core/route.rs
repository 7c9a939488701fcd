//! Where clients go: `View → Routing`. The agent's endpoint, the other fronts and the routers act on nothing else.
//!
//! A routing says how long it may be believed. Who gets no newer one knows nothing then, and lets nobody in (S12).

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::health::leader_position;
use super::lsn::Lsn;
use super::names::MemberName;
use super::records::{Durability, LeaderState, MemberRecord, Role};
use super::rules::Facts;
use super::time::Moment;
use super::timeline::Term;
use super::view::{GuardState, JobKind, LocalPostgres, View};

/// Where a member's endpoint listens; a member without one is reached by nobody through an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointPorts {
    pub read_write: u16,
    pub read_only: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routing {
    /// The highest term that is known.
    pub term: Term,
    pub write: Route,
    /// Standbys that take readers; whoever asks applies its own limit of lag.
    pub readers: Vec<Reader>,
    /// PostgreSQL here is a standby that answers.
    pub standby_here: bool,
    /// An acknowledgement counts for more than the primary's disk: doubtful ones wait for a barrier (protocol §4).
    pub sync: bool,
    /// Every member with its endpoint, if it has one. A cancel key names its member by the place in this order.
    pub members: BTreeMap<MemberName, Option<Place>>,
    /// On this machine's clocks.
    pub valid_until: Moment,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Route {
    /// The primary is here, under this term.
    Local {
        term: Term,
    },
    To {
        member: MemberName,
        place: Place,
    },
    /// Nobody can be let in now; SQLSTATE and a sentence.
    Refuse {
        sqlstate: String,
        text: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub host: String,
    pub ports: EndpointPorts,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reader {
    pub member: MemberName,
    pub place: Option<Place>,
    /// Bytes behind the leader, as last told; `None`: not known.
    pub lag: Option<u64>,
    pub here: bool,
}

/// What an agent tells routers: the same without this machine's clocks, and with its own address where it is the place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    pub member: MemberName,
    pub term: Term,
    pub primary: Option<Located>,
    /// Why there is none.
    pub refused: Option<String>,
    pub readers: Vec<Located>,
    pub members: BTreeMap<MemberName, Option<Place>>,
    pub sync: bool,
    /// How long this may be believed from the moment of the question.
    pub valid_for_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Located {
    pub member: MemberName,
    #[serde(flatten)]
    pub place: Place,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<u64>,
}

/// What `view`'s agent tells routers at `now`.
pub fn published(view: &View, now: Moment) -> Published {
    let routing = routing(view);
    let me = &view.me;
    let here = me.endpoint.map(|ports| Place { host: me.host.clone(), ports });
    let located = |member: &MemberName, place: &Option<Place>, lag| {
        Some(Located { member: member.clone(), place: place.clone()?, lag_bytes: lag })
    };
    let (primary, refused) = match &routing.write {
        Route::Local { .. } => (located(&me.id.name, &here, None), None),
        Route::To { member, place } => (located(member, &Some(place.clone()), None), None),
        Route::Refuse { text, .. } => (None, Some(text.clone())),
    };
    let readers = routing.readers.iter().filter_map(|reader| {
        located(&reader.member, if reader.here { &here } else { &reader.place }, reader.lag)
            .filter(|located| located.place.ports.read_only.is_some())
    });
    let mut members = routing.members.clone();
    members.insert(me.id.name.clone(), here.clone());
    Published {
        member: me.id.name.clone(),
        term: routing.term,
        primary,
        refused,
        readers: readers.collect(),
        members,
        sync: routing.sync,
        valid_for_ms: u64::try_from(now.until(routing.valid_until).as_millis()).unwrap_or(u64::MAX),
    }
}

impl Published {
    /// For a router that asked at `asked` on its own clocks.
    pub fn routing(self, asked: Moment) -> Routing {
        let write = match self.primary {
            Some(Located { member, place, .. }) => Route::To { member, place },
            None => Route::Refuse {
                sqlstate: CANNOT_CONNECT_NOW.to_owned(),
                text: self.refused.unwrap_or_else(|| "there is no primary".to_owned()),
            },
        };
        let reader = |located: Located| Reader {
            member: located.member,
            place: Some(located.place),
            lag: located.lag_bytes,
            here: false,
        };
        Routing {
            term: self.term,
            write,
            readers: self.readers.into_iter().map(reader).collect(),
            standby_here: false,
            sync: self.sync,
            members: self.members,
            valid_until: asked.plus(Duration::from_millis(self.valid_for_ms)),
        }
    }
}

/// PostgreSQL's word for "come back later": drivers that know it open their connections again.
const CANNOT_CONNECT_NOW: &str = "57P03";

/// What is true of `view` about where clients go.
pub fn routing(view: &View) -> Routing {
    let facts = Facts::of(view);
    let members = members(view, facts.as_ref());
    Routing {
        term: view.memory.term.max(view.memory.durable.highest_term),
        write: write(view, facts.as_ref(), &members),
        readers: facts.as_ref().map(|facts| readers(facts, &members)).unwrap_or_default(),
        standby_here: view.local.postgres.standby().is_some(),
        sync: view.policy.durability != Durability::Async,
        valid_until: valid_until(view),
        members,
    }
}

fn members(view: &View, facts: Option<&Facts<'_>>) -> BTreeMap<MemberName, Option<Place>> {
    let published = facts.map(|facts| &facts.records.members);
    let place = |name: &MemberName| published?.get(name).and_then(|record| place(&record.value));
    // Configured, not published: the order must not depend on who has spoken yet.
    view.me.configured.iter().map(|name| (name.clone(), place(name))).collect()
}

fn place(record: &MemberRecord) -> Option<Place> {
    Some(Place { host: record.host.clone(), ports: record.endpoint? })
}

fn write(view: &View, facts: Option<&Facts<'_>>, members: &BTreeMap<MemberName, Option<Place>>) -> Route {
    let refuse = |text: String| Route::Refuse { sqlstate: CANNOT_CONNECT_NOW.to_owned(), text };
    let Some(facts) = facts else { return refuse("the cluster's state is not known here now".to_owned()) };
    let Some(leader) = facts.leader.map(|keyed| &keyed.value) else {
        return refuse("there is no primary yet".to_owned());
    };
    match &leader.state {
        LeaderState::Electing { .. } => refuse(format!("a new primary is being elected (term {})", leader.term)),
        LeaderState::Released { .. } | LeaderState::Fenced { .. } => {
            refuse(format!("there is no primary: {} has given up term {}", leader.holder.name, leader.term))
        }
        LeaderState::Held if leader.holder == view.me.id => match here(view, leader.term) {
            Ok(()) => Route::Local { term: leader.term },
            Err(why) => refuse(why),
        },
        // An earlier life of this member led: whatever runs here now is not it.
        LeaderState::Held if leader.holder.name == view.me.id.name => refuse(format!(
            "there is no primary: {} led term {} in another incarnation",
            leader.holder.name, leader.term
        )),
        LeaderState::Held => match members.get(&leader.holder.name).cloned().flatten() {
            Some(place) => Route::To { member: leader.holder.name.clone(), place },
            None => refuse(format!("the primary {} tells no address of an endpoint", leader.holder.name)),
        },
    }
}

/// May clients come to the primary here? The gate asks the deadline page again before every write (S4).
fn here(view: &View, term: Term) -> Result<(), String> {
    if !view.lease.valid(term, view.now) {
        return Err(format!("the lease of term {term} is not renewed"));
    }
    let LocalPostgres::Primary(primary) = &view.local.postgres else {
        return Err(format!("PostgreSQL does not answer as primary of term {term}"));
    };
    let armed = matches!(view.local.guard.state, GuardState::Running { armed: Some(armed), .. } if armed == term);
    let leaving = matches!(&view.job, Some(job) if matches!(job.what, JobKind::HandOver { .. } | JobKind::Stop | JobKind::Restart));
    match () {
        () if !armed => Err(format!("the guardian does not count the deadlines of term {term}")),
        () if !primary.writable => Err("the primary is read-only".to_owned()),
        () if leaving => Err("the primary is about to stop".to_owned()),
        () => Ok(()),
    }
}

fn readers(facts: &Facts<'_>, members: &BTreeMap<MemberName, Option<Place>>) -> Vec<Reader> {
    let end = leader_position(facts.view);
    let behind = |replayed: Option<Lsn>| Some(replayed?.bytes_to(end?));
    let me = &facts.me().name;
    let mut readers: Vec<Reader> = Vec::new();
    if let Some(standby) = facts.view.local.postgres.standby()
        && !facts.view.me.tags.noloadbalance
    {
        readers.push(Reader { member: me.clone(), place: None, lag: behind(Some(standby.replayed)), here: true });
    }
    for (name, record) in &facts.records.members {
        let record = &record.value;
        let Some(place) = members.get(name).cloned().flatten() else { continue };
        let takes_readers = record.role == Role::Standby && !record.tags.noloadbalance && facts.is_there(name);
        if name != me && takes_readers && place.ports.read_only.is_some() {
            readers.push(Reader {
                member: name.clone(),
                place: Some(place),
                lag: behind(record.replayed),
                here: false,
            });
        }
    }
    readers
}

/// Where this member leads, until the guardian kills; elsewhere, until the leader that is known may have been replaced.
fn valid_until(view: &View) -> Moment {
    let timings = &view.policy.timings;
    let ttl = view
        .store
        .records()
        .and_then(|records| records.leader())
        .map_or(timings.ttl, |leader| Duration::from_millis(leader.ttl_ms));
    match (&view.lease, &view.memory.silence) {
        (super::view::LeaseView::Held { deadline, .. }, _) => deadline.minus(timings.kill_budget),
        (_, Some(silence)) => silence.first_seen.plus(timings.candidate_wait(ttl)),
        (_, None) => view.now.plus(timings.candidate_wait(ttl)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::records::Entry;
    use crate::core::testing::{NOW, cluster, id, lag, name, secs};
    use crate::core::view::{Job, Store};

    const PORTS: EndpointPorts = EndpointPorts { read_write: 6432, read_only: Some(6433) };

    fn healthy() -> crate::core::testing::Cluster {
        cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(5_000)).sync(1, ["b", "c"]).records(|records| {
            for member in records.members.values_mut() {
                member.value.endpoint = Some(PORTS);
            }
        })
    }

    fn refused(view: &View) -> String {
        match routing(view).write {
            Route::Refuse { sqlstate, text } => {
                assert_eq!(sqlstate, "57P03");
                text
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn clients_come_to_the_primary_under_its_term() {
        let routing = routing(&healthy().seen_by("a"));
        assert_eq!((routing.write, routing.term), (Route::Local { term: Term(4) }, Term(4)));
        assert_eq!(routing.valid_until, NOW.plus(secs(7)), "F = D - K");
        assert!(routing.sync && !routing.standby_here);
    }

    #[test]
    fn standbys_send_clients_to_the_primary_and_say_until_when() {
        let routing = routing(&healthy().seen_by("b"));
        let place = Place { host: "a.example".to_owned(), ports: PORTS };
        assert_eq!(routing.write, Route::To { member: name("a"), place });
        assert!(routing.valid_until.all_reached(NOW.plus(secs(8))));
        assert!(routing.standby_here);
    }

    #[test]
    fn readers_come_with_their_lag_the_own_standby_first() {
        let readers = routing(&healthy().seen_by("b")).readers;
        let seen: Vec<_> = readers.iter().map(|r| (r.member.as_str(), r.lag, r.here)).collect();
        assert_eq!(seen, [("b", Some(0), true), ("c", Some(5_000), false)]);
        let unbalanced = crate::core::records::Tags { noloadbalance: true, ..Default::default() };
        let readers = routing(&healthy().tags("b", unbalanced).seen_by("a")).readers;
        assert_eq!(readers.iter().map(|r| r.member.as_str()).collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn the_gate_stays_shut_until_everything_is_in_place() {
        let open = || healthy().seen_by("a");
        let mut unarmed = open();
        unarmed.local.guard.state = GuardState::Running { postmaster: 1, armed: Some(Term(3)) };
        assert!(refused(&unarmed).contains("guardian"));
        let mut expired = open();
        expired.now = NOW.plus(secs(9));
        assert!(refused(&expired).contains("lease"));
        let mut down = open();
        down.local.postgres = LocalPostgres::Down;
        assert!(refused(&down).contains("does not answer"));
        let mut leaving = open();
        let what = JobKind::HandOver { to: None };
        leaving.job = Some(Job { what, since: NOW, done_bytes: None, total_bytes: None, result: None });
        assert!(refused(&leaving).contains("about to stop"));
    }

    #[test]
    fn nobody_is_sent_to_a_leader_that_is_none() {
        let with = |state: LeaderState| {
            healthy().records(|records| {
                if let Entry::Present(leader) = &mut records.leader {
                    leader.value.state = state;
                }
            })
        };
        for who in ["a", "b"] {
            assert!(
                refused(&with(LeaderState::Released { to: None, why: String::new() }).seen_by(who))
                    .contains("given up")
            );
            let electing = LeaderState::Electing { coordinator: name("b"), preferred: None, winner: None };
            assert!(refused(&with(electing).seen_by(who)).contains("elected"));
        }
        let mut blind = healthy().seen_by("b");
        blind.store = Store::Unknown { why: "gone".to_owned(), since: NOW };
        assert!(refused(&blind).contains("not known"));
        let reborn = healthy().records(|records| {
            if let Entry::Present(leader) = &mut records.leader {
                leader.value.holder.incarnation = id("z").incarnation;
            }
        });
        assert!(refused(&reborn.seen_by("a")).contains("another incarnation"));
    }

    #[test]
    fn members_keep_their_order_whoever_has_spoken() {
        let all = routing(&healthy().seen_by("b")).members;
        let silent = routing(&cluster().leader("a", 4).seen_by("b")).members;
        assert_eq!(all.keys().collect::<Vec<_>>(), silent.keys().collect::<Vec<_>>());
        assert!(silent.values().all(Option::is_none));
    }
}
