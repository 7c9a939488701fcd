//! Who has everything must not lead (a tag says so): a sealed member that may lead takes the missing WAL from it, is sealed
//! again where that ends, and wins (protocol §5 step 4).
//!
//! Both find it in the seals of the term, so nothing more is written for it. The seal bars WAL *from a leader* of a lower
//! term; the source is sealed itself, so nothing of the old leader comes through it. Whoever dies in between leaves a
//! standby with more WAL of the same line: the next election counts it as such.

use super::Facts;
use crate::core::election::{Copying, Verdict, judge};
use crate::core::plan::{Plan, Step};
use crate::core::records::LeaderState;
use crate::core::timeline::Term;
use crate::core::view::LocalPostgres;

pub fn sentence(copying: &Copying) -> String {
    format!(
        "{} has everything and must not lead: {} copies its WAL up to {} of timeline {} first",
        copying.from, copying.by, copying.end, copying.timeline
    )
}

/// What the seals of the term that is being elected ask this member to copy.
pub fn asked(facts: &Facts<'_>) -> Option<Copying> {
    let leader = facts.records.leader()?;
    let LeaderState::Electing { preferred, winner: None, .. } = &leader.state else { return None };
    match judge(facts.records, leader, facts.view.policy.max_lag, preferred.as_ref()) {
        Verdict::Copying(copying) if copying.by == facts.me().name => Some(copying),
        Verdict::Copying(_) | Verdict::Elected(_) | Verdict::Waiting { .. } | Verdict::Impossible { .. } => None,
    }
}

pub fn copy(facts: &Facts<'_>, term: Term, leader_revision: i64, copying: &Copying) -> Plan {
    let what = sentence(copying);
    let standby = match &facts.view.local.postgres {
        LocalPostgres::Standby(standby) => standby,
        LocalPostgres::Down => return Plan::new("copy.start", format!("{what}: starting")).steps(facts.start_parked()),
        LocalPostgres::Starting { why } | LocalPostgres::Unknown { why } => {
            return Plan::new("copy.wait", format!("{what}; PostgreSQL here does not answer yet ({why})"));
        }
        LocalPostgres::Primary(_) => return Plan::new("copy.wait", format!("{what}; PostgreSQL here is no standby")),
    };
    if standby.timeline == copying.timeline && standby.replayed >= copying.end {
        return Plan::new("copy.seal", format!("{what}: done, sealing where it ends"))
            .step(Step::Seal { term, leader_revision });
    }
    let Some(follow) = facts.follow(&copying.from, term) else {
        return Plan::new("copy.address", format!("{what}; its address is not known yet"));
    };
    if standby.follows.as_ref() != Some(&follow) {
        return Plan::new("copy.turn", what).step(Step::Follow { follow });
    }
    Plan::new("copy", format!("{what}; {} bytes are missing", standby.replayed.bytes_to(copying.end)))
}
