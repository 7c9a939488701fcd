//! A disk that takes no writes (L4): whoever leads with it gives up, as long as somebody can take over; whoever does not lead
//! does not begin to, and is not started on it.

use super::{Facts, leader};
use crate::core::election::list;
use crate::core::names::{MemberId, MemberName};
use crate::core::plan::{Plan, Step};
use crate::core::records::{Durability, Key, Keyed, LeaderRecord, LeaderState, Transaction, Write};
use crate::core::storage::{Trouble, full, no_memory, room_for, stalls_at, trouble};
use crate::core::view::View;

/// Comes before everything that waits for PostgreSQL: `SELECT 1` stays green through a stall, and what waits for the disk
/// waits for ever.
pub fn rule(view: &View) -> Option<Plan> {
    let trouble = trouble(view)?;
    let facts = Facts::of(view)?;
    facts.records.init.value()?;
    let mine = facts.mine()?;
    match &mine.value.state {
        LeaderState::Held => {
            let to = successor(&facts).ok()?;
            let why = format!("{trouble}; {to} takes over");
            Some(give_up(&facts, mine, Some(to), &why))
        }
        LeaderState::Electing { .. } => {
            let why = format!("{trouble}: this member cannot be promoted");
            Some(give_up(&facts, mine, None, &why))
        }
        LeaderState::Released { .. } | LeaderState::Fenced { .. } => None,
    }
}

/// Kills PostgreSQL and says that the term is over. In sync mode the seals of the others prove that nothing more is
/// acknowledged, so nobody waits for processes that hang in the disk; in async mode the kill comes first, and fails as long
/// as a process is left that could still run (protocol §3).
fn give_up(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, to: Option<MemberName>, why: &str) -> Plan {
    let mut record = mine.value.clone();
    record.lsn = facts.last_published_lsn();
    record.state = LeaderState::Released { to, why: why.to_owned() };
    let say =
        facts.commit("release the term", Transaction::when(Key::Leader, mine.revision).put(Write::Leader(record)));
    let sync = facts.records.sync.value().is_some_and(|claim| claim.mode != Durability::Async);
    let order = if sync { [say, Step::Kill] } else { [Step::Kill, say] };
    Plan::new("storage", why).steps(order).step(Step::DropLease)
}

/// Who takes over: streams from here, and with enough others of C to prove what was acknowledged (q seals without this
/// member, whose own cannot be had while its disk hangs).
fn successor(facts: &Facts<'_>) -> Result<MemberName, String> {
    let ready = leader::ready_standby(facts).ok_or("no standby is ready to take over")?;
    let claim = facts.records.sync.value().ok_or("the key `sync` cannot be read")?;
    if claim.mode == Durability::Async {
        return Ok(ready);
    }
    let electorate = claim.electorate();
    let is_there = |id: &&MemberId| {
        let record = facts.records.members.get(&id.name).map(|m| &m.value);
        **id != *facts.me()
            && facts.is_there(&id.name)
            && record.is_some_and(|r| r.incarnation == id.incarnation && r.storage.trouble.is_none())
    };
    let there = electorate.iter().filter(is_there).count();
    if there >= claim.seals_needed() {
        return Ok(ready);
    }
    let missing = electorate.iter().filter(|id| *id != facts.me() && !is_there(id)).map(|id| &id.name);
    Err(format!(
        "{} others must be there to know every acknowledged commit, {there} are; missing: {}",
        claim.seals_needed(),
        list(missing)
    ))
}

/// What a plan of another rule should say of the disk beside its own reason (L6), and when to look again.
pub fn remark(view: &View, plan: &mut Plan) {
    if plan.rule == "storage" {
        return;
    }
    let leads = Facts::of(view).is_some_and(|f| f.mine().is_some_and(|l| l.value.state == LeaderState::Held));
    if leads && let Some(at) = stalls_at(view) {
        plan.wake = Some(match plan.wake {
            Some(wake) if view.now.until(wake) < view.now.until(at) => wake,
            _ => at,
        });
    }
    let said = match (trouble(view), no_memory(view), full(view)) {
        (Some(trouble), _, _) if leads => {
            let why = Facts::of(view).and_then(|f| successor(&f).err()).unwrap_or_default();
            format!("{trouble}, and nobody can take over ({why})")
        }
        (Some(trouble), _, _) => format!("{trouble}: no candidate"),
        (None, Some(trouble), _) => format!("{trouble}: nothing can be promised or sealed here"),
        (None, None, Some(full)) => full,
        (None, None, None) => return,
    };
    plan.reason = format!("{}; {said}", plan.reason);
}

/// Is there room for a copy of the leader's data? Not knowing its size is no reason not to try.
pub fn room_for_copy(facts: &Facts<'_>) -> Result<(), String> {
    let leader = facts.leader.and_then(|l| facts.records.members.get(&l.value.holder.name));
    match leader.and_then(|m| m.value.storage.data_bytes) {
        Some(bytes) => room_for(facts.view, bytes),
        None => Ok(()),
    }
}

/// Why PostgreSQL is not started here: on a disk that hangs it could not be stopped again.
pub fn not_to_start(view: &View) -> Option<Trouble> {
    trouble(view)
}

/// Why this member does not stand for leader, when it does not.
pub fn not_to_lead(view: &View) -> Option<Trouble> {
    trouble(view).or_else(|| no_memory(view))
}
