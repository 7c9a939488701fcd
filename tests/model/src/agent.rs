//! One member's agent: a round (observe, decide, lint), and the plan's steps, one arm per step.

use std::cell::RefCell;

use ahash::AHashMap;

use crate::core::decide::decide;
use crate::core::lint;
use crate::core::plan::{Plan, Step};
use crate::core::records::{Key, LeaderState, SyncClaim, Transaction, Write};
use crate::properties as broken;
use crate::view::{LEADER_AT, LEASE_AT, SEAL_AT, SYNC_AT, Seen, inc_of, index, rule_of, set_of};
use crate::world::*;

/// What a round of one member comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    pub memory: Packed,
    /// Done within the round, before anybody else can act.
    pub at_once: AtOnce,
    pub work: Work,
    pub txn: Txn,
    pub broken: u8,
}

impl Outcome {
    /// Nobody else can see it: it need not be told apart from its having happened.
    pub fn is_quiet(&self) -> bool {
        let AtOnce { remember: _, keep: _, follow: _, drop_lease, kill, arm, start, new_incarnation, begin } =
            self.at_once;
        let visible = drop_lease || kill || arm > 0 || start || new_incarnation || begin;
        !visible && self.work == Work::None && self.broken == 0
    }
}

/// Local steps at the head of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AtOnce {
    pub remember: Option<(u8, u8)>,
    pub keep: Option<(u8, bool)>,
    pub drop_lease: bool,
    pub kill: bool,
    pub arm: u8,
    pub start: bool,
    pub follow: Option<Upstream>,
    pub new_incarnation: bool,
    /// The head of a job: the promise and the emptied settings, the armed guardian, the rule in the file.
    pub begin: bool,
}

thread_local! {
    static KNOWN: RefCell<AHashMap<Seen, Outcome>> = RefCell::new(AHashMap::new());
}
/// Rounds that one thread keeps; about 700 bytes each.
const KEPT: usize = 1_500_000;

/// Equal views give equal plans: a round that was decided once is looked up.
pub fn outcome(seen: &Seen, max_term: u8) -> Outcome {
    KNOWN.with_borrow_mut(|known| {
        if let Some(outcome) = known.get(seen) {
            return *outcome;
        }
        let (plan, memory, lint) = decided(seen);
        let mut outcome = pack(seen, &plan, max_term);
        outcome.memory = memory;
        if lint {
            outcome.broken = broken::LINT;
        }
        if known.len() >= KEPT {
            known.clear();
        }
        known.insert(*seen, outcome);
        outcome
    })
}

pub fn decided(seen: &Seen) -> (Plan, Packed, bool) {
    let mut view = seen.view();
    let mut plan = decide(&view);
    // What the term rests on is written to the state file before anything else of a plan; nobody is asked for promises here,
    // so the word itself decides nothing and is not kept.
    while let Some(lead) = plan.steps.iter().find_map(|step| match step {
        Step::RememberLead { lead } if view.memory.durable.lead.as_ref() != Some(lead) => Some((**lead).clone()),
        _ => None,
    }) {
        view.memory.durable.lead = Some(lead);
        plan = decide(&view);
    }
    let lint = !lint::violations(&view, &plan).is_empty();
    (plan, seen.pack_memory(&view.memory), lint)
}

fn pack(seen: &Seen, plan: &Plan, max_term: u8) -> Outcome {
    let mut out = Outcome {
        memory: Packed::default(),
        at_once: AtOnce::default(),
        work: Work::None,
        txn: Txn::default(),
        broken: 0,
    };
    for step in &plan.steps {
        match step {
            // Told to the others by an action of its own.
            Step::Commit { what, .. } if what == "publish this member" => {}
            // Every slot is there from the beginning, and one slot admits one walsender.
            Step::KeepSlots { .. } | Step::EndWalsenders { .. } | Step::Reload | Step::RememberLead { .. } => {}
            _ => one(seen, step, &mut out),
        }
    }
    // Bounds: elections beyond are not begun.
    if out.txn.writes & LEADER != 0 && out.txn.leader.term > max_term {
        return Outcome {
            work: Work::None,
            txn: Txn::default(),
            at_once: AtOnce { kill: false, ..out.at_once },
            ..out
        };
    }
    out
}

fn one(seen: &Seen, step: &Step, out: &mut Outcome) {
    let now = &mut out.at_once;
    let behind = !matches!(out.work, Work::None);
    match (step, &mut out.work) {
        (Step::Remember { highest_term, highest_sync_term, .. }, Work::None) => {
            now.remember = Some((highest_term.0 as u8, highest_sync_term.0 as u8));
        }
        (Step::KeepLease { term, leader_revision }, Work::None) => {
            now.keep = Some((term.0 as u8, *leader_revision == LEADER_AT));
        }
        (Step::Kill, Work::Commit { kill, .. }) => *kill = true,
        (Step::DropLease, Work::Commit { drop, .. }) => *drop = true,
        (Step::Kill, Work::None) => now.kill = true,
        (Step::DropLease, Work::None) => now.drop_lease = true,
        (Step::Arm { term }, Work::None) => now.arm = term.0 as u8,
        (Step::Start { follow: None }, Work::None) => now.start = true,
        (Step::Start { follow: Some(follow) }, Work::None) => {
            out.work = Work::StartFollowing { upstream: upstream(seen, follow) };
        }
        (Step::Follow { follow }, Work::None) => now.follow = Some(upstream(seen, follow)),
        (Step::NewIncarnation { .. }, Work::None) => now.new_incarnation = true,
        (Step::Rewind { from, .. }, Work::None) => {
            now.begin = true;
            out.work = Work::Rewind { from: index(&from.member) };
        }
        (Step::Commit { transaction, .. }, Work::None) => {
            out.txn = transaction_of(seen, transaction);
            out.work = Work::Commit { kill: false, drop: false };
        }
        (Step::Seal { term, leader_revision }, Work::None) => {
            now.begin = true;
            out.txn = Txn {
                sender: seen.me,
                writes: SEAL,
                guards: if *leader_revision == LEADER_AT { LEADER } else { 0 },
                ..Txn::default()
            };
            out.work = Work::Seal { term: term.0 as u8 };
        }
        (Step::Promote { order }, Work::None) => {
            now.begin = true;
            out.work = Work::Promote {
                term: order.term.0 as u8,
                number: order.timeline.0 as u8,
                parent: order.parent.0 as u8,
                switch: order.switch.0 as u8,
            };
        }
        (Step::Enforce { from, to }, Work::None) => {
            now.begin = true;
            let from = from.as_ref().map(rule_of).unwrap_or_default();
            let to = rule_of(to);
            out.work = Work::Enforce { phase: Phase::Decided, through_nobody: goes_through_nobody(from, to), to };
        }
        (other, work) => unreachable!("the model knows no {other:?} behind {work:?} ({behind})"),
    }
}

/// `postgres/enforce.rs: goes_through_nobody`, the adapter's part that the core does not see.
fn goes_through_nobody(from: Rule, to: Rule) -> bool {
    match (from, to) {
        (_, Rule::Cleared) => false,
        (_, Rule::Nobody) => true,
        (Rule::Unknown | Rule::Cleared, Rule::Any { .. }) => true,
        (Rule::Nobody, Rule::Any { .. }) => false,
        (Rule::Any { k: old, .. }, Rule::Any { k: new, .. }) => new > old,
        (_, Rule::Unknown) => false,
    }
}

fn upstream(seen: &Seen, follow: &crate::core::plan::Follow) -> Upstream {
    let inc = crate::core::plan::parse_walreceiver_name(&follow.walreceiver).map(|(id, _)| inc_of(id.incarnation));
    Upstream { term: follow.term.0 as u8, member: index(&follow.upstream.member), inc: inc.unwrap_or(seen.inc) }
}

/// What is compared becomes bits. A comparison with a revision that is not the present one can never hold any more.
fn transaction_of(seen: &Seen, transaction: &Transaction) -> Txn {
    let mut txn = Txn { sender: seen.me, ..Txn::default() };
    for compare in &transaction.compare {
        txn.guards |= match &compare.key {
            Key::Leader => flag(compare.revision, LEADER_AT, LEADER),
            Key::Lease => flag(compare.revision, LEASE_AT, LEASE),
            Key::Sync => flag(compare.revision, SYNC_AT, SYNC),
            Key::Timeline(_) => flag(compare.revision, 0, TIMELINE),
            Key::Seal(name) => {
                let m = index(name);
                flag(compare.revision, SEAL_AT + i64::from(m), SEAL << m)
            }
            other => unreachable!("the model compares no {other:?}"),
        };
    }
    for write in &transaction.write {
        match write {
            Write::Leader(record) => {
                // Who coordinated, and whom he would have preferred, is forgotten once there is a winner.
                let (office, asked, wins) = match &record.state {
                    LeaderState::Held => (Office::Held, NOBODY, 0),
                    LeaderState::Released { to, .. } => (Office::Released, some(to.as_ref()), 0),
                    LeaderState::Electing { preferred, winner: None, .. } => {
                        (Office::Electing, some(preferred.as_ref()), 0)
                    }
                    LeaderState::Electing { winner: Some(winner), .. } => {
                        (Office::Winner, NOBODY, winner.timeline.0 as u8)
                    }
                    LeaderState::Fenced { .. } => unreachable!("nothing survives a kill here"),
                };
                txn.writes |= LEADER;
                txn.leader = Leader {
                    term: record.term.0 as u8,
                    holder: index(&record.holder.name),
                    inc: inc_of(record.holder.incarnation),
                    office,
                    asked,
                    wins,
                    last: record.last.as_ref().map_or(1, |p| p.timeline.0 as u8),
                };
            }
            Write::Sync(claim) => {
                txn.writes |= SYNC;
                txn.claim = claim_of(claim);
            }
            Write::Timeline(number, link) => {
                txn.writes |= TIMELINE;
                txn.number = number.0 as u8;
                txn.timeline =
                    Timeline { term: link.term.0 as u8, parent: link.parent.0 as u8, switch: link.switch.0 as u8 };
            }
            // Only for people.
            Write::History(_) => {}
            other => unreachable!("the model writes no {:?}", other.key()),
        }
    }
    txn
}

fn flag(revision: i64, present: i64, bit: u8) -> u8 {
    assert_eq!(revision, present, "a plan compares with a revision that its own view does not show");
    bit
}

fn some(name: Option<&crate::core::MemberName>) -> u8 {
    name.map_or(NOBODY, index)
}

fn claim_of(claim: &SyncClaim) -> Claim {
    Claim {
        primary: index(&claim.primary.name),
        inc: inc_of(claim.primary.incarnation),
        k: claim.k as u8,
        term: claim.term.0 as u8,
        members: set_of(&claim.members),
    }
}
