//! Somebody else coordinates an election: give our word that no WAL of a lower term is taken any more.

use super::{Facts, copying, takeover};
use crate::core::Moment;
use crate::core::plan::{Plan, Step};
use crate::core::promise::Bond;
use crate::core::records::LeaderState;
use crate::core::view::{DataDirectory, LocalPostgres, View};

pub fn rule(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let leader = facts.leader.filter(|l| l.value.holder != *facts.me())?;
    let term = leader.value.term;
    let LeaderState::Electing { coordinator, winner: None, .. } = &leader.value.state else { return None };
    if !matches!(view.local.data, DataDirectory::Present { .. }) {
        return Some(Plan::new(
            "seal.no_data",
            format!("{coordinator} elects for term {term}; there is no data here to seal"),
        ));
    }
    if view.memory.durable.must_follow {
        let why = format!(
            "{coordinator} elects for term {term}; what was copied here is not consistent yet and seals nothing"
        );
        return Some(Plan::new("seal.copied", why));
    }
    // A coordinator that is silent is overtaken like a leader: that is the next rules' matter, sealed or not.
    if takeover::is_open(&facts, &leader.value) {
        return None;
    }
    let sealed = facts
        .records
        .seals
        .get(&facts.me().name)
        .is_some_and(|seal| seal.value.term == term && seal.value.incarnation == facts.me().incarnation);
    if let Some(copying) = copying::asked(&facts).filter(|_| sealed) {
        return Some(copying::copy(&facts, term, leader.revision, &copying));
    }
    // Whoever was copying and is not any more (somebody with everything may lead after all) is sealed where it is now.
    let copies = view.local.postgres.standby().is_some_and(|standby| standby.follows.is_some());
    if sealed && !copies {
        return Some(Plan::new("seal.done", format!("sealed for term {term}; waiting for {coordinator} to choose")));
    }
    Some(seal(&facts, term, leader.revision, &format!("{coordinator} elects for term {term}")))
}

/// Why a member that promised does nothing, in words.
pub fn bound(bond: &Bond, now: Moment) -> String {
    format!(
        "this member promised {} (term {}) to take no part in a higher term for another {}",
        bond.promise.to.name,
        bond.promise.term,
        super::seconds(now.until(bond.until))
    )
}

/// Seals this member, after bringing PostgreSQL to where it can be sealed.
pub fn seal(facts: &Facts<'_>, term: crate::core::timeline::Term, leader_revision: i64, because: &str) -> Plan {
    // S1: who promised the sitting leader takes no part in a higher term until its own clocks say so.
    if let Some(bond) = facts.bond().filter(|bond| bond.promise.term < term) {
        let why = format!("{because}: {}", bound(bond, facts.now()));
        return Plan::new("seal.bound", why).wake_at(bond.until);
    }
    match &facts.view.local.postgres {
        LocalPostgres::Standby(_) => {
            Plan::new("seal", format!("{because}: sealing")).step(Step::Seal { term, leader_revision })
        }
        // The coordinator itself always starts: it is there to be sealed.
        LocalPostgres::Down if facts.mine().is_some() => {
            Plan::new("seal.start", format!("{because}: starting PostgreSQL parked to learn its position"))
                .steps(facts.start_parked())
        }
        LocalPostgres::Down => {
            let since = facts.view.memory.term_since.unwrap_or(facts.now());
            let wake = since.plus(facts.view.policy.election_wait);
            match facts.start_when_needed(since) {
                Some(start) => {
                    Plan::new("seal.start", format!("{because}: starting PostgreSQL parked to learn its position"))
                        .step(start)
                }
                None => {
                    Plan::new("seal.others", format!("{because}: the others are enough, PostgreSQL starts after it"))
                        .wake_at(wake)
                }
            }
        }
        LocalPostgres::Starting { why } => {
            Plan::new("seal.recovery", format!("{because}: waiting for recovery here ({why})"))
        }
        // `superseded` has killed a primary before this; unknown facts have their own rule.
        LocalPostgres::Primary(_) | LocalPostgres::Unknown { .. } => {
            Plan::new("seal.wait", format!("{because}: PostgreSQL here cannot be sealed yet"))
        }
    }
}
