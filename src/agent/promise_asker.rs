//! Asks the other members for promises while renewals are late: the second task of the lease keeper's thread.
//!
//! All are asked at once, each question with its own deadline, so that a dead host delays nobody's answer; each answer moves
//! the deadline as it comes, counted from before its question was sent.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tracing::debug;

use super::lease_keeper::Shared;
use crate::core::holding::Ask;
use crate::core::names::{ClusterName, MemberName};
use crate::core::peers::{Asks, Question, Says, VERSION};
use crate::core::promise::Answer;
use crate::ports::Peers;

/// A question waits for an fsync at the other end, also where the heartbeat is short.
const LEAST_PATIENCE: Duration = Duration::from_millis(500);
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

pub(super) struct Asker {
    pub peers: Arc<dyn Peers>,
    pub cluster: ClusterName,
    pub shared: Arc<Shared>,
}

impl Asker {
    pub async fn run(self) {
        let peers = self.peers.separate();
        let clock = self.shared.clock.clone();
        loop {
            let began = clock.now();
            match self.shared.whom_to_ask() {
                Ask::Nobody => self.shared.ask.notified().await,
                Ask::At(at) => {
                    let pause = clock.now().until(at).max(SHORTEST_PAUSE);
                    // Both arms only tell that it is time to look again.
                    tokio::select! {
                        () = self.shared.ask.notified() => {}
                        () = tokio::time::sleep(pause) => {}
                    }
                }
                Ask::Now { promise, system_identifier, members } => {
                    let question = Question {
                        version: VERSION,
                        cluster: self.cluster.clone(),
                        system_identifier,
                        from: promise.to.clone(),
                        asks: Asks::Promise(promise.clone()),
                    };
                    let mut asked: FuturesUnordered<_> =
                        members.into_iter().map(|member| self.ask(peers.as_ref(), &question, member)).collect();
                    while let Some((member, answer)) = asked.next().await {
                        debug!(term = %promise.term, %member, ?answer, "asked for a promise");
                        self.shared.answered(promise.term, member, answer);
                    }
                    // Not cut short by every renewal that fails meanwhile.
                    tokio::time::sleep(self.shared.pause_after(began).max(SHORTEST_PAUSE)).await;
                }
            }
        }
    }

    async fn ask(&self, peers: &dyn Peers, question: &Question, member: MemberName) -> (MemberName, Answer) {
        // A member that is there answers after one fsync. Whoever does not is asked again.
        let within = self.shared.timings.heartbeat.max(LEAST_PATIENCE);
        let sent = self.shared.clock.now();
        let silent = |why: String| Answer::Silent { why, granted: None };
        let answer = match peers.ask(&member, question, within).await {
            Err(error) => silent(error.to_string()),
            Ok(answer) => match answer.says {
                Says::Promised { highest_term, store_id } => {
                    Answer::Granted { incarnation: answer.from.incarnation, sent, highest_term, store_id }
                }
                Says::NotPromised { why } => Answer::Refused { why },
                Says::Refused { why } => silent(why),
                Says::Report(_) | Says::Unknown => silent("it answered something else".to_owned()),
            },
        };
        (member, answer)
    }
}
