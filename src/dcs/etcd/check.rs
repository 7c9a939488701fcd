//! Is this store fit for a cluster? Asked by `config check` and said at the start of an agent.

use std::collections::BTreeSet;

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};
use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use super::members::Members;
use crate::dcs::schema::Root;
use crate::ports::DcsError;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreCheck {
    /// etcd's cluster id.
    pub store_id: u64,
    /// In the order of the settings.
    pub members: Vec<MemberCheck>,
    /// Sentences for the operator; none when all is as it should be.
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberCheck {
    pub endpoint: String,
    /// Or why it did not say.
    pub status: Result<MemberStatus, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    pub version: String,
    pub store_id: u64,
    pub is_leader: bool,
}

pub async fn check(members: &Members, root: &Root, deadline: Instant) -> Result<StoreCheck, DcsError> {
    let (asked, access) = tokio::join!(
        join_all((0..members.len()).map(|member| status(members, member, deadline))),
        access(members, root, deadline),
    );
    let store_id = access?;
    let mut warnings = Vec::new();
    let mut store_ids = BTreeSet::from([store_id]);
    for member in &asked {
        match &member.check.status {
            Ok(status) => {
                store_ids.insert(status.store_id);
                warnings.extend(outdated(&status.version).map(|why| format!("{}: {why}", member.check.endpoint)));
            }
            Err(why) => warnings.push(format!("does not answer: {why}")),
        }
        warnings.extend(member.complaints.iter().map(|what| format!("{} complains: {what}", member.check.endpoint)));
    }
    if store_ids.len() > 1 {
        warnings.push(
            "the endpoints belong to different etcd clusters: etcd.endpoints must name members of one".to_owned(),
        );
    }
    if members.len() < 3 {
        warnings.push(format!(
            "{} etcd endpoint(s): with fewer than three members of etcd, the loss of one stops it; name every member in etcd.endpoints",
            members.len()
        ));
    }
    Ok(StoreCheck { store_id, members: asked.into_iter().map(|asked| asked.check).collect(), warnings })
}

struct Asked {
    check: MemberCheck,
    complaints: Vec<String>,
}

async fn status(members: &Members, member: usize, deadline: Instant) -> Asked {
    let endpoint = members.endpoint(member).to_owned();
    let patience = (Instant::now() + 2 * members.try_timeout()).min(deadline);
    let ask = members.ask(member, |mut client| async move { client.status().await });
    let (status, complaints) = match timeout_at(patience, ask).await {
        Ok(Ok(answer)) => {
            let header = answer.header();
            let status = MemberStatus {
                version: answer.version().to_owned(),
                store_id: header.map_or(0, |h| h.cluster_id()),
                is_leader: header.is_some_and(|h| h.member_id() == answer.leader()),
            };
            (Ok(status), answer.errors().to_vec())
        }
        Ok(Err(failure)) => (Err(failure.why().to_owned()), Vec::new()),
        Err(_) => (Err(format!("{endpoint}: no answer")), Vec::new()),
    };
    Asked { check: MemberCheck { endpoint, status }, complaints }
}

/// A read, and a transaction that cannot succeed: etcd looks at the rights of all its parts before it compares.
async fn access(members: &Members, root: &Root, deadline: Instant) -> Result<u64, DcsError> {
    let read = |mut client: etcd_client::Client| async move {
        client.get(root.as_str(), Some(GetOptions::new().with_prefix().with_count_only())).await
    };
    let (_, answer) = members.read("read from etcd", deadline, read).await?;
    let never = Txn::new()
        .when([Compare::mod_revision(root.key("leader"), CompareOp::Equal, i64::MAX)])
        .and_then([TxnOp::put(root.key("leader"), "", None)]);
    let write = |mut client: etcd_client::Client| {
        let never = never.clone();
        async move { client.txn(never).await }
    };
    members.write("write to etcd", deadline, write).await?;
    Ok(answer.header().map_or(0, |h| h.cluster_id()))
}

/// Fixed in these: a member may answer a linearizable read with old data after it was paused.
const SOUND: [(u32, u32); 3] = [(4, 42), (5, 28), (6, 9)];

fn outdated(version: &str) -> Option<String> {
    let mut numbers = version.split(['.', '-', '+']).map(|part| part.parse::<u32>());
    let (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch))) = (numbers.next(), numbers.next(), numbers.next()) else {
        return Some(format!("`{version}` is not a version of etcd that we know"));
    };
    let sound = match (major, SOUND.iter().find(|(known, _)| *known == minor)) {
        (3, Some((_, since))) => patch >= *since,
        (3, None) => minor > 6,
        (major, _) => major > 3,
    };
    (!sound).then(|| {
        format!(
            "etcd {version} may answer reads with old data after it was paused; fixed in 3.4.42, 3.5.28 and 3.6.9: upgrade it"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::outdated;

    #[test]
    fn knows_the_versions_that_read_stale() {
        for old in ["3.4.23", "3.4.41", "3.5.27", "3.6.8", "3.3.99", "2.3.8", "", "3.5", "x.y.z"] {
            assert!(outdated(old).is_some(), "{old}");
        }
        for sound in ["3.4.42", "3.5.28", "3.5.30-rc.1", "3.6.9", "3.7.0", "4.0.0"] {
            assert_eq!(outdated(sound), None, "{sound}");
        }
    }
}
