//! Everything was off: no reachable member's PostgreSQL is older than the last sign of life of a leader (protocol §8).
//!
//! With synchronous durability the published claim says whom an election needs, as always. In async nobody but the last
//! primary is known to have every commit: it is waited for, then a person decides.

use super::{Facts, seconds};
use crate::core::lsn::Lsn;
use crate::core::names::MemberName;
use crate::core::records::SyncClaim;

/// No member that speaks, this one included, has run PostgreSQL since before the last sign of life.
fn is_cold(facts: &Facts<'_>) -> bool {
    let witness = |(name, _): (&MemberName, _)| {
        facts.speaks(name) && facts.records.members.get(name).is_some_and(|m| m.value.witness)
    };
    let others = facts.records.members.iter().filter(|(name, _)| **name != facts.me().name);
    !facts.view.memory.witness && !others.into_iter().any(witness)
}

/// May this member begin an election in async? The error names whom it waits for, and what would be lost.
pub fn may_stand(facts: &Facts<'_>, claim: &SyncClaim) -> Result<(), String> {
    let me = facts.me();
    if !facts.records.membership.value().is_some_and(|m| m.members.contains(&me.name)) {
        return Err("this member is not in the membership yet".to_owned());
    }
    let last = &claim.primary;
    if last == me || facts.records.forced().is_some() || !is_cold(facts) {
        return Ok(());
    }
    let record = facts.records.members.get(&last.name).filter(|_| facts.speaks(&last.name));
    match record {
        Some(record) if record.value.incarnation == last.incarnation => {
            return Err(format!("everything was off; {} led last, is back and goes first", last.name));
        }
        Some(_) => {
            return Err(format!(
                "everything was off, and the data that {} led with are gone; {}",
                last.name,
                ask(facts, &last.name)
            ));
        }
        None => {}
    }
    let since = facts.view.memory.silence.map(|s| s.first_seen).unwrap_or(facts.now());
    let (waited, wait) = (facts.now().since(since), facts.view.policy.cold_start_wait);
    if waited < wait {
        return Err(format!(
            "everything was off; waiting for {}, which led last and alone is known to have every commit, for {} of {} \
             (cold_start.wait)",
            last.name,
            seconds(waited),
            seconds(wait)
        ));
    }
    Err(format!(
        "everything was off, and {}, which led last, is not back after {}; {}",
        last.name,
        seconds(waited),
        ask(facts, &last.name)
    ))
}

/// What a person decides by, with the loss before his eyes.
fn ask(facts: &Facts<'_>, last: &MemberName) -> String {
    let losses: Vec<String> = facts
        .records
        .members
        .iter()
        .filter(|(name, _)| facts.speaks(name))
        .filter_map(|(name, m)| Some(format!("{name} {}", behind(m.value.replayed?, facts.last_published_lsn(), last))))
        .collect();
    format!(
        "a person decides: `pgvigil failover --force` elects without it and loses what it alone has ({})",
        losses.join(", ")
    )
}

/// Never exact while the old disk is away: a heartbeat's writes come on top.
pub fn behind(at: Lsn, published: Option<Lsn>, last: &MemberName) -> String {
    match published {
        Some(end) => format!("is {} bytes behind the last position that {last} published", at.bytes_to(end)),
        None => format!("is behind by what nobody knows: no position of {last} was published"),
    }
}
