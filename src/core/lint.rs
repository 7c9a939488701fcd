//! The invariants as code: what no plan may ever hold, whatever rule made it. Run in every test, in the model, and before
//! every plan in production, where a violation stops the plan and is an ERROR.

use std::time::Duration;

use super::plan::{Plan, Step};
use super::records::{Durability, Entry, Key, LeaderState, Write};
use super::rules::Facts;
use super::view::{DataDirectory, GuardState, LocalPostgres, View};

/// One sentence for each invariant that `plan` would break in `view`.
pub fn violations(view: &View, plan: &Plan) -> Vec<String> {
    let mut found = Vec::new();
    let facts = Facts::of(view);
    let mine = facts.as_ref().and_then(Facts::mine);
    for step in &plan.steps {
        match step {
            // S2: lease before promotion; the record names us as its winner.
            Step::Promote { order } => {
                let winner = mine.is_some_and(|l| {
                    matches!(&l.value.state, LeaderState::Electing { winner: Some(w), .. }
                        if w.member == view.me.id && w.timeline == order.timeline && w.switch == order.switch)
                });
                if !winner || !view.lease.valid(order.term, view.now) {
                    found.push(format!(
                        "S8: promotion without being the winner under a valid lease of term {}",
                        order.term
                    ));
                }
                if view.memory.durable.sealed_term != order.term {
                    found.push(format!("S1: promotion without an own seal of term {}", order.term));
                }
            }
            // S5
            Step::Bootstrap => {
                let unknown_cluster =
                    facts.as_ref().is_some_and(|f| matches!(f.records.init, Entry::Absent)) && mine.is_some();
                if !unknown_cluster
                    || view.me.system_identifier.is_some()
                    || !matches!(view.local.data, DataDirectory::Empty)
                {
                    found.push("S5: initdb although a cluster, a memory or data may be there".to_owned());
                }
            }
            Step::SetAside { .. } => {
                let other_leads = facts
                    .as_ref()
                    .and_then(|f| f.leader)
                    .is_some_and(|l| l.value.state == LeaderState::Held && l.value.holder != view.me.id);
                let never_joined = view.me.system_identifier.is_none();
                if !other_leads && !never_joined {
                    found.push("S5: data set aside while no other member leads".to_owned());
                }
            }
            Step::Clone { .. } | Step::Rewind { .. } => {
                if matches!(view.local.postgres, LocalPostgres::Primary(_)) {
                    found.push("S5: clone or rewind over a running primary".to_owned());
                }
            }
            Step::Commit { what, transaction } => {
                let guarded = |key: &Key| transaction.compare.iter().any(|c| c.key == *key);
                for write in &transaction.write {
                    let key = write.key();
                    let leaders = matches!(
                        write,
                        Write::Sync(_)
                            | Write::Membership(_)
                            | Write::Init(_)
                            | Write::Timeline(..)
                            | Write::History(_)
                    );
                    if leaders && !guarded(&Key::Leader) {
                        found.push(format!("S1: `{what}` writes {key:?} without comparing the leader record"));
                    }
                    if matches!(write, Write::Leader(_) | Write::Sync(_) | Write::Timeline(..)) && !guarded(&key) {
                        found.push(format!("S9: `{what}` writes {key:?} without comparing it"));
                    }
                    if let Write::Leader(record) = write {
                        if record.state == LeaderState::Held
                            && !view.lease.valid(record.term, view.now)
                            && !plan.rule.starts_with("leader.mend")
                        {
                            found.push(format!("S8: `{what}` publishes term {} without its lease", record.term));
                        }
                        let takes = record.holder == view.me.id && mine.is_none();
                        if takes && !guarded(&Key::Lease) && !plan.rule.starts_with("leader.mend") {
                            found.push(format!("S1: `{what}` takes the record over without comparing the lease"));
                        }
                        // Whoever acknowledges alone is ended by its clock, or by a person.
                        let acknowledges_alone = facts.as_ref().is_some_and(|f| {
                            let alone = f.records.sync.value().is_none_or(|claim| claim.mode == Durability::Async);
                            let silence = view.memory.silence;
                            f.leader.filter(|_| alone && takes).is_some_and(|l| {
                                let wait = view.policy.timings.candidate_wait(Duration::from_millis(l.value.ttl_ms));
                                matches!(l.value.state, LeaderState::Held | LeaderState::Electing { .. })
                                    && !silence.is_some_and(|s| view.now.all_reached(s.first_seen.plus(wait)))
                            })
                        });
                        if acknowledges_alone {
                            found.push(format!("S1: `{what}` takes an async term before W"));
                        }
                        let seen = facts.as_ref().and_then(|f| f.leader).map(|l| l.value.term).unwrap_or_default();
                        if record.term < seen {
                            found.push(format!("S1: `{what}` takes the term back from {seen} to {}", record.term));
                        }
                    }
                }
            }
            Step::Remember { highest_term, .. } => {
                if *highest_term < view.memory.durable.highest_term {
                    found.push("S12: a lower term would be remembered".to_owned());
                }
            }
            Step::Follow { follow } => {
                if follow.term < view.memory.durable.sealed_term {
                    found.push(format!("S1: following a leader of term {} after sealing a higher one", follow.term));
                }
            }
            Step::HoldByPromises { term } => {
                let armed =
                    matches!(view.local.guard.state, GuardState::Running { armed: Some(armed), .. } if armed <= *term);
                if !armed {
                    found.push(format!("S1: term {term} held by promises without PostgreSQL under it"));
                }
            }
            Step::AcceptStore { highest_term, .. } => {
                if *highest_term <= view.memory.durable.highest_term {
                    found.push(format!("S12: a lost store believed for term {highest_term}"));
                }
            }
            Step::RememberLead { lead } => {
                let known = view.memory.durable.lead.as_ref().filter(|known| known.record.term == lead.record.term);
                let settled = view.memory.sync_settled && !view.memory.doubtful_sync;
                if !settled && known.is_some_and(|known| known.claims.iter().any(|c| !lead.claims.contains(c))) {
                    found.push("S1: a claim that may stand would be forgotten".to_owned());
                }
            }
            Step::EndPromise { to, term } => {
                let given_back = view.memory.bond.as_ref().is_some_and(|bond| {
                    bond.promise.to == *to
                        && bond.promise.term == *term
                        && facts.as_ref().is_some_and(|f| bond.promise.given_back(f.records))
                });
                if !given_back {
                    found.push(format!("S1: the promise to {} (term {term}) is taken back by us", to.name));
                }
            }
            Step::DistrustStore
            | Step::Join { .. }
            | Step::NewIncarnation { .. }
            | Step::Arm { .. }
            | Step::ForgetCrashes
            | Step::KeepLease { .. }
            | Step::DropLease
            | Step::Kill
            | Step::Disarm
            | Step::Start { .. }
            | Step::EndWalsenders { .. }
            | Step::KeepSlots { .. }
            | Step::Reload
            | Step::Seal { .. }
            | Step::Enforce { .. }
            | Step::HandOver { .. }
            | Step::RestartInPlace { .. }
            | Step::Stop { .. }
            | Step::FinishRequest { .. }
            | Step::Exit => {}
        }
    }
    found
}
