//! A schedule as numbered sentences.

use crate::agent::decided;
use crate::model::Action;
use crate::view::Seen;
use crate::world::*;

const NAMES: [&str; 3] = ["a", "b", "c"];

fn name(n: u8) -> &'static str {
    NAMES.get(usize::from(n)).copied().unwrap_or("nobody")
}

pub fn sentence(before: &World, action: Action, after: &World) -> String {
    let m = |n: u8| &before.members[usize::from(n)];
    match action {
        Action::Round(n) => {
            let (plan, _, _) = decided(&Seen::by(before, usize::from(n)));
            format!("{}: {} ({})", name(n), plan.rule, plan.reason)
        }
        Action::Commit(n) if m(n).cut => format!("{}: the store is not reached, nothing was written", name(n)),
        Action::Commit(n) => format!("{} writes {}", name(n), written(&m(n).txn)),
        Action::CommitLost(n) => format!("{} writes {}, and the answer is lost", name(n), written(&m(n).txn)),
        Action::CommitLate(n) => {
            format!("{} gets no answer to {}, which is still on its way", name(n), written(&m(n).txn))
        }
        Action::Land => format!("late: {} of {} arrives", written(&before.late), name(before.late.sender)),
        Action::Rest(n) => format!("{} does what its plan says after the write", name(n)),
        Action::Renew(n) if m(n).kept == Kept::Stale => format!("{}: the renewal finds another record", name(n)),
        Action::Renew(n) => format!("{} renews term {}", name(n), m(n).lease_term),
        Action::RenewLost(n) => format!("{} renews term {}, and the answer is lost", name(n), m(n).lease_term),
        Action::Publish(n) => format!("{} publishes its incarnation {}", name(n), m(n).inc),
        Action::Job(n) => job(name(n), m(n), &after.members[usize::from(n)]),
        Action::JobFails(n) => format!("{}: {:?} fails", name(n), m(n).work),
        Action::Write(n) => {
            let m = m(n);
            format!("{}: a client commits at {} of timeline {}", name(n), m.flushed + 1, m.timeline)
        }
        Action::Connect(n) => {
            let now = &after.members[usize::from(n)];
            format!(
                "{} streams from {} and has flushed {} of timeline {}",
                name(n),
                name(m(n).acts_by.member),
                now.flushed,
                now.timeline
            )
        }
        Action::Stream(n) => {
            let now = &after.members[usize::from(n)];
            let heard = if now.mute { ", of which nothing is heard" } else { "" };
            format!("{} has flushed {} of timeline {}{heard}", name(n), now.flushed, now.timeline)
        }
        Action::RowEnds(p, s) => format!("{}: the walsender of {} ends", name(p), name(s)),
        Action::StartupTakes(n) => format!("{}: the startup process takes the new settings", name(n)),
        Action::CheckpointerTakes(n) => format!("{}: the checkpointer takes {:?}", name(n), m(n).rule),
        Action::WalsenderTakes(p, s) => format!("{}: the walsender of {} takes {:?}", name(p), name(s), m(p).rule),
        Action::PastF(n) => format!("time: the guardian of {} kills PostgreSQL (F)", name(n)),
        Action::PastD(n) => format!("time: the lease of {} is over (D)", name(n)),
        Action::GuardianKills(n) => format!("{}: the guardian kills PostgreSQL", name(n)),
        Action::Silent(n) => format!("time: {} has seen the same lease for W", name(n)),
        Action::Suspects(n) => format!("time: {} has heard nothing of the holder for takeover.after", name(n)),
        Action::Misjudged(n) => format!("fault: {} and the others hear nothing of a holder that lives", name(n)),
        Action::Waited(n) => format!("time: {} has let the others go first", name(n)),
        Action::Stalled(n, s) => format!("time: {} has missed {} for sync.max_stall", name(n), name(s)),
        Action::Forgets(n) => format!("time: it is long ago that {} saw a standby stream", name(n)),
        Action::Patience(n) => format!("time: {} has waited for followers", name(n)),
        Action::Overdue(n) => format!("time: the election of {} has taken too long", name(n)),
        Action::Crash(n) => format!("fault: PostgreSQL of {} is killed", name(n)),
        Action::AgentCrash(n) => format!("fault: the agent of {} is killed", name(n)),
        Action::HostCrash(n) => format!("fault: the host of {} goes down", name(n)),
        Action::Pause(n) => format!("fault: everything on {} is stopped", name(n)),
        Action::Cut(n) => format!("fault: cut {} from the store", name(n)),
        Action::Apart(n) => format!("fault: cut {} from the other members", name(n)),
        Action::Mute(n) => format!("fault: {} hears the others and is not heard", name(n)),
        Action::AgentBack(n) => format!("the agent of {} is back", name(n)),
        Action::HostBack(n) => format!("the host of {} is back", name(n)),
        Action::Resume(n) => format!("{} goes on where it was stopped", name(n)),
        Action::Heal(n) => format!("the network of {} heals", name(n)),
    }
}

fn job(who: &str, before: &Member, after: &Member) -> String {
    match before.work {
        Work::Seal { term } => {
            format!("{who} is sealed for term {term} at {} of timeline {}", before.flushed, before.timeline)
        }
        Work::Promote { .. } if after.pg == Pg::Primary => {
            format!("{who} is promoted to timeline {} at {}", after.timeline, after.flushed)
        }
        Work::Promote { number, .. } => format!("{who}: the promotion does not become timeline {number}: killed"),
        Work::Enforce { phase: Phase::Decided, to, .. } => format!("{who} begins to put {to:?} into force"),
        Work::Enforce { phase: Phase::Nobody, .. } => format!("{who}: a commit waits for nobody; the rule is written"),
        Work::Enforce { phase: Phase::Written, .. } => {
            format!("{who}: no walsender outside the rule votes; the barrier begins")
        }
        Work::Enforce { phase: Phase::Barrier, to, .. } => {
            format!("{who}: the barrier has returned, {to:?} is in force")
        }
        Work::Rewind { from } => format!("{who} is rewound to {} of {}", after.flushed, name(from)),
        Work::StartFollowing { upstream } => format!("{who} starts after {}", name(upstream.member)),
        Work::None | Work::Commit { .. } | Work::Rest { .. } => format!("{who}: nothing"),
    }
}

fn written(txn: &Txn) -> String {
    let mut parts = Vec::new();
    if txn.writes & LEADER != 0 {
        let l = &txn.leader;
        let asked = if l.asked == NOBODY { String::new() } else { format!(", asked for {}", name(l.asked)) };
        parts.push(format!("leader = {} {:?} term {}{asked}", name(l.holder), l.office, l.term));
    }
    if txn.writes & SYNC != 0 {
        let c = &txn.claim;
        let members: Vec<String> = c.members.all().map(|(m, inc)| format!("{}.{inc}", NAMES[m])).collect();
        parts.push(format!("sync = {}.{} and {} of [{}]", name(c.primary), c.inc, c.k, members.join(" ")));
    }
    if txn.writes & TIMELINE != 0 {
        parts.push(format!("timeline {} leaves {} at {}", txn.number, txn.timeline.parent, txn.timeline.switch));
    }
    if txn.writes & SEAL != 0 {
        parts.push(format!("its seal of term {} at {} of timeline {}", txn.seal.term, txn.seal.at, txn.seal.timeline));
    }
    parts.join("; ")
}

/// What stands at the end.
pub fn state(w: &World) -> String {
    let l = &w.store.leader;
    let c = &w.store.claim;
    let named = |set: Set| set.all().map(|(m, inc)| format!("{}.{inc}", NAMES[m])).collect::<Vec<_>>().join(" ");
    let rule = |rule: Rule| match rule {
        Rule::Any { k, members } => format!("ANY {k} ({})", named(members)),
        other => format!("{other:?}"),
    };
    let mut lines = vec![
        format!("leader: {}.{} {:?} term {}, published timeline {}", name(l.holder), l.inc, l.office, l.term, l.last),
        format!("sync: {}.{} and {} of [{}], term {}", name(c.primary), c.inc, c.k, named(c.members), c.term),
    ];
    for (n, t) in w.store.timelines.iter().enumerate().filter(|(_, t)| t.term > 0) {
        lines.push(format!("timeline {n}: term {}, leaves {} at {}", t.term, t.parent, t.switch));
    }
    let told: Vec<String> =
        w.acked.iter().enumerate().skip(1).filter(|(_, at)| **at > 0).map(|(n, at)| format!("{at} of {n}")).collect();
    lines.push(format!("acknowledged: {}", told.join(", ")));
    for (i, m) in w.members.iter().enumerate() {
        lines.push(format!(
            "{}.{}: {:?} at {} of timeline {}, sealed {}, lease {:?} {} {:?}, armed {}, {:?}",
            NAMES[i],
            m.inc,
            m.pg,
            m.flushed,
            m.timeline,
            m.sealed_term,
            m.lease,
            m.lease_term,
            m.clock,
            m.armed,
            m.work
        ));
        if m.pg == Pg::Primary {
            let believed = rule(m.memory.enforced);
            lines.push(format!("   rule {} (believed {believed}), backends wait: {}", rule(m.rule), m.flag));
            for (s, row) in m.walsenders.iter().enumerate().filter(|(_, row)| row.on) {
                let copy = rule(row.rule);
                lines.push(format!(
                    "   walsender {}.{}_{} has {}, goes by {copy}",
                    NAMES[s], row.inc, row.term, row.flushed
                ));
            }
        }
    }
    lines.join("\n")
}
