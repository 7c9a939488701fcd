//! Is the store the one that we know, and does it still say what it said? (S12, protocol §7)
//!
//! A store that is another one, or that went back, is *lost* as far as elections go: its records may be of the past, and an
//! old claim is a stronger one than what was enforced since. It stays lost until a leader that sits makes it good under a
//! term above every one that this member remembers, or a person does.

use super::names::MemberId;
use super::records::{ClusterRecords, LeaderState};
use super::timeline::Term;
use super::view::{LeaseView, Memory};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    Right,
    Lost {
        why: String,
    },
    /// It was lost, and a leader above everything that we remember renews in it.
    MadeGood {
        term: Term,
    },
}

pub fn trust(records: &ClusterRecords, memory: &Memory, lease: &LeaseView, me: &MemberId) -> Trust {
    let Some(why) = doubt(records, memory) else { return Trust::Right };
    match made_good(records, memory, lease, me) {
        Some(term) => Trust::MadeGood { term },
        None => Trust::Lost { why },
    }
}

fn doubt(records: &ClusterRecords, memory: &Memory) -> Option<String> {
    let durable = &memory.durable;
    let here = records.store_id;
    let vouched = records.leader().map(|leader| leader.store_id).unwrap_or(0);
    if durable.store_id != 0 && durable.store_id != here {
        return Some(format!(
            "it is another one (cluster id {here:x}, remembered {:x}): etcd.endpoints name the wrong etcd, or it was wiped or \
             restored",
            durable.store_id
        ));
    }
    if vouched != 0 && vouched != here {
        return Some(format!(
            "its records were written for another etcd (cluster id {vouched:x}, this one is {here:x}): restored from a backup"
        ));
    }
    let seen = memory.store_seen.filter(|(id, _)| *id == here).map(|(_, revision)| revision).unwrap_or(0);
    let known = durable.store_revision.max(seen);
    if records.revision < known {
        return Some(format!(
            "it went back to revision {} from {known}: wiped, or restored from a backup",
            records.revision
        ));
    }
    durable.store_lost.then(|| "it had become another one or gone back, and nobody has made it good since".to_owned())
}

/// A backup has no living leader, and no term above what its members remember unless they slept through it.
fn made_good(records: &ClusterRecords, memory: &Memory, lease: &LeaseView, me: &MemberId) -> Option<Term> {
    let leader = records.leader()?;
    let above = leader.term > memory.durable.highest_term;
    let vouched = leader.store_id == records.store_id;
    let lives = if leader.holder == *me {
        lease.term() == Some(leader.term)
    } else {
        memory.silence.is_some_and(|s| s.term == leader.term && s.renewed)
    };
    (above && vouched && lives && leader.state == LeaderState::Held).then_some(leader.term)
}
