//! Who is not who it should be is refused before anything is touched (S7).

use std::time::Duration;

use super::Facts;
use crate::core::plan::{Plan, Step};
use crate::core::records::MemberRecord;
use crate::core::view::{DataDirectory, GuardState, View};

/// Does this directory, this state file and this store belong together?
pub fn belongs(view: &View) -> Option<Plan> {
    // Told to stop, that is what happens: stopping touches nothing that is not ours.
    if view.stopping {
        return None;
    }
    let refuse = |why: String| Some(Plan::new("identity.refused", why));
    let in_directory = match &view.local.data {
        DataDirectory::Foreign { why } => {
            return refuse(format!(
                "{why}; nothing is touched: let postgresql.data_dir name this member's own directory, or an empty one"
            ));
        }
        DataDirectory::Present { system_identifier, .. } => Some(*system_identifier),
        DataDirectory::Empty | DataDirectory::Unfinished { .. } | DataDirectory::Unknown { .. } => None,
    };
    let remembered = view.me.system_identifier;
    let published = view.store.records().and_then(|r| r.init.value()).map(|init| init.system_identifier);
    if let (Some(found), Some(remembered)) = (in_directory, remembered)
        && found != remembered
    {
        return refuse(format!(
            "the data directory has system identifier {found}, this member's state file says {remembered}: another \
             database was put here; restore the right directory or remove the state file to begin anew"
        ));
    }
    for (where_, found) in [("the data directory", in_directory), ("this member's state file", remembered)] {
        if let (Some(found), Some(published)) = (found, published)
            && found != published
        {
            return refuse(format!(
                "{where_} has system identifier {found}, the cluster in the store has {published}: wrong cluster name, \
                 wrong etcd or wrong directory"
            ));
        }
    }
    if in_directory.is_some() && remembered.is_none() {
        return refuse(
            "the data directory holds a database that this member does not know (no state file speaks of it): set it aside, \
             or restore the state file that belongs to it"
                .to_owned(),
        );
    }
    None
}

/// A start counter below the one that this incarnation published: the state file was brought back from the past, and with
/// it the promises. The data may be as old, so this is another life of the member (protocol §0).
pub fn restored(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let record = &facts.records.members.get(&facts.me().name)?.value;
    // At the start only: what is written over our own record later is a copy's, and no reason to forget who we are.
    let starts = view.memory.published.is_none() && !sits(&facts);
    let back = record.incarnation == facts.me().incarnation && record.start_counter > view.me.start_counter && starts;
    back.then(|| {
        Plan::new(
            "identity.restored",
            format!(
                "this is start {} of the member, the store knows {}: it was restored from an older copy and begins a new \
                 incarnation",
                view.me.start_counter, record.start_counter
            ),
        )
        .step(Step::NewIncarnation { copied: false })
    })
}

/// Is another agent using this member's name? A copy of the member, state file and all, says so with the same incarnation.
pub fn unique(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let record = &facts.records.members.get(&facts.me().name)?.value;
    // Who sits under a valid lease is not disturbed by a copy: the copy finds it speaking, and waits.
    if sits(&facts) || is_ours(view, record) {
        return None;
    }
    // Another life of this name. If it still speaks, it is somebody else; if it is silent, it is our own past.
    let (_, seen) = view.memory.beats.get(&facts.me().name)?;
    let patience: Duration = view.policy.member_publish * 2;
    let silent = facts.now().since(*seen);
    if silent >= patience {
        return None;
    }
    Some(
        Plan::new(
            "identity.name_in_use",
            format!(
                "the store knows {} as incarnation {} at {} (start {}); waiting whether it still speaks, because two agents \
                 must never share a name",
                facts.me().name,
                record.incarnation,
                record.api_url,
                record.start_counter
            ),
        )
        .wake_at(seen.plus(patience)),
    )
}

fn sits(facts: &Facts<'_>) -> bool {
    facts.mine().is_some_and(|leader| facts.view.lease.valid(leader.value.term, facts.now()))
}

/// Written by this agent, or by an earlier start of it that is certainly over: under the same kernel and on the same port,
/// which nobody else can have taken meanwhile. After a reboot it takes a moment's silence to know.
fn is_ours(view: &View, record: &MemberRecord) -> bool {
    let me = &view.me;
    if view.memory.published.as_ref().is_some_and(|(_, ours)| ours.beat == record.beat) {
        return true;
    }
    // A guardian of ours that is armed speaks for us too: the port may have been changed with the restart.
    let armed = matches!(view.local.guard.state, GuardState::Running { armed: Some(_), .. });
    let here = record.boot_id == me.boot_id && (record.api_url == me.api_url || armed);
    here && record.incarnation == me.id.incarnation && record.start_counter <= me.start_counter
}
