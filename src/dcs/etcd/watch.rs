//! The watch over the cluster's prefix: a hint to read again, nothing more.
//!
//! One task, for ever. The stream does not reconnect by itself, has no deadline of its own and may be silent because nothing
//! happens or because the member hangs: so progress is asked for, and a stream that does not answer is given up.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use etcd_client::{GetOptions, WatchOptions};
use tokio::sync::watch::Sender;
use tokio::time::{Instant, timeout};

use super::members::Members;

/// A stream that says nothing for so long is asked for its progress, and given up after as long again without an answer.
const SILENCE: Duration = Duration::from_secs(1);

/// For the read that says where the watch begins.
const READ_WITHIN: Duration = Duration::from_secs(5);

const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

pub async fn keep_watching(members: Arc<Members>, changes: Arc<Sender<u64>>) {
    loop {
        // A stream that was established begins the pauses anew.
        let pauses = ExponentialBuilder::default()
            .with_min_delay(SHORTEST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .without_max_times()
            .with_jitter()
            .build();
        for pause in pauses {
            let mut established = false;
            let why = watch(&members, &changes, &mut established).await;
            tracing::debug!(%why, established, "the watch over etcd ended, beginning another one");
            tokio::time::sleep(if established { SHORTEST_PAUSE } else { pause }).await;
            if established {
                break;
            }
        }
    }
}

/// Watches until it ends, and says why it did.
async fn watch(members: &Members, changes: &Sender<u64>, established: &mut bool) -> String {
    let root = members.root().as_str();
    let revision = |mut client: etcd_client::Client| async move {
        client.get(root, Some(GetOptions::new().with_prefix().with_count_only())).await
    };
    let (member, answer) = match members.read("begin a watch", Instant::now() + READ_WITHIN, revision).await {
        Ok(read) => read,
        Err(error) => return error.to_string(),
    };
    let Some(revision) = answer.header().map(|header| header.revision()) else {
        return "an answer without a header".to_owned();
    };
    let patience = members.try_timeout().max(SILENCE);
    let mut client = match timeout(patience, members.client(member)).await {
        Ok(Ok(client)) => client,
        Ok(Err(failure)) => return failure.why().to_owned(),
        Err(_) => return silent(members, member),
    };
    let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
    let mut stream = match timeout(patience, client.watch(root, Some(options))).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return members.blame(member, &error).why().to_owned(),
        Err(_) => return silent(members, member),
    };
    let mut asked = false;
    loop {
        // Cancel-safe: `message()` only polls the stream, a message that is half there stays in it.
        let message = match timeout(SILENCE, stream.message()).await {
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => return format!("{}: ended the watch", members.endpoint(member)),
            Ok(Err(error)) => return members.blame(member, &error).why().to_owned(),
            Err(_) if asked => return silent(members, member),
            Err(_) => {
                asked = true;
                match timeout(SILENCE, stream.request_progress()).await {
                    Ok(Ok(())) => continue,
                    Ok(Err(error)) => return members.blame(member, &error).why().to_owned(),
                    Err(_) => return silent(members, member),
                }
            }
        };
        asked = false;
        // A first message can be `created` and `canceled` at once: a revision that is compacted, or a token that ended, for
        // which etcd-client logs in again with unary calls only.
        if message.canceled() {
            if message.cancel_reason().contains("auth token") || message.cancel_reason().contains("permission") {
                let _ = timeout(patience, client.refresh_token()).await;
            }
            return format!("{}: cancelled the watch: {}", members.endpoint(member), message.cancel_reason());
        }
        if message.created() {
            *established = true;
        }
        // Established: whatever changed before is for the reader to see, everything after it comes as an event.
        if message.created() || !message.events().is_empty() {
            changes.send_modify(|n| *n += 1);
        }
    }
}

fn silent(members: &Members, member: usize) -> String {
    members.silent(member);
    format!("{}: the watch is silent", members.endpoint(member))
}
