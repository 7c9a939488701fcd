//! Asks the other agents how they are, all the time, and keeps what came of it. A thread of its own with its own runtime, so
//! that nothing else can make a living member look dead; one task per member, each of which may be dropped at any await.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::core::lease::Timings;
use crate::core::names::{ClusterName, MemberId, MemberName};
use crate::core::peers::{Answer, Asks, Door, Heard, Peer, Question, Report, Says, Tried, VERSION};
use crate::ports::{Clock, PeerError, Peers};

/// Deadline of one question. One lost packet costs a retransmission (0.2 s), two cost 0.6 s.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
const KNOCK_WITHIN: Duration = Duration::from_millis(300);
/// Between two questions at least: somebody who closes every connection must not make us spin.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

/// Who asks; known to the loop, which learns of a new incarnation first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    pub id: MemberId,
    pub system_identifier: Option<u64>,
}

/// The loop's handle.
pub struct PeerWatch {
    known: watch::Receiver<BTreeMap<MemberName, Peer>>,
    news: watch::Receiver<u64>,
    pace: watch::Sender<Duration>,
    introduction: watch::Sender<Option<Introduction>>,
}

impl PeerWatch {
    /// Starts the thread; `members` are the others.
    pub fn start(
        port: Box<dyn Peers>,
        cluster: ClusterName,
        members: Vec<MemberName>,
        clock: Arc<dyn Clock>,
        timings: Timings,
    ) -> std::io::Result<PeerWatch> {
        let (watch, tasks) = PeerWatch::new(port, cluster, members, clock, timings);
        std::thread::Builder::new().name("peers".to_owned()).spawn(move || {
            super::priority::raise();
            match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(futures_util::future::join_all(tasks.into_iter().map(Task::run))),
                Err(error) => {
                    // Nothing is known of the others then: no takeover before W, which is safe.
                    warn!(%error, "the runtime that asks the other agents cannot be made");
                    Vec::new()
                }
            }
        })?;
        Ok(watch)
    }

    fn new(
        port: Box<dyn Peers>,
        cluster: ClusterName,
        members: Vec<MemberName>,
        clock: Arc<dyn Clock>,
        timings: Timings,
    ) -> (PeerWatch, Vec<Task>) {
        let nothing = members.iter().map(|name| (name.clone(), Peer::default())).collect();
        let (known, known_rx) = watch::channel(nothing);
        let (news, news_rx) = watch::channel(0);
        let (pace, pace_rx) = watch::channel(timings.heartbeat);
        let (introduction, introduction_rx) = watch::channel(None);
        let port: Arc<dyn Peers> = port.into();
        let task = |member: MemberName| Task {
            port: port.clone(),
            cluster: cluster.clone(),
            member,
            clock: clock.clone(),
            loop_patience: timings.loop_patience(),
            known: known.clone(),
            news: news.clone(),
            pace: pace_rx.clone(),
            introduction: introduction_rx.clone(),
        };
        let tasks = members.into_iter().map(task).collect();
        (PeerWatch { known: known_rx, news: news_rx, pace, introduction }, tasks)
    }

    pub fn known(&self) -> BTreeMap<MemberName, Peer> {
        self.known.borrow().clone()
    }

    /// Grows when a port opened, closed or fell silent, or a member said something that decisions hang on.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.news.clone()
    }

    /// From now on everybody is asked this often.
    pub fn pace(&self, every: Duration) {
        self.pace.send_if_modified(|pace| std::mem::replace(pace, every) != every);
    }

    pub fn introduce(&self, me: Introduction) {
        self.introduction.send_if_modified(|known| {
            let changed = known.as_ref() != Some(&me);
            *known = Some(me);
            changed
        });
    }
}

struct Task {
    port: Arc<dyn Peers>,
    cluster: ClusterName,
    member: MemberName,
    clock: Arc<dyn Clock>,
    loop_patience: Duration,
    known: watch::Sender<BTreeMap<MemberName, Peer>>,
    news: watch::Sender<u64>,
    pace: watch::Receiver<Duration>,
    introduction: watch::Receiver<Option<Introduction>>,
}

impl Task {
    async fn run(mut self) {
        // An error means that the loop's handle is gone, and the process with it.
        while let Ok(me) = self.introduction.wait_for(Option::is_some).await.map(|me| me.clone()) {
            let Some(me) = me else { continue };
            let not_before = Instant::now() + SHORTEST_PAUSE;
            self.ask(me).await;
            let pause = *self.pace.borrow_and_update();
            // Where no connection is, its end is no news.
            let (open, port, member) = (self.is_open(), self.port.clone(), self.member.clone());
            let parted = async move { if open { port.parted(&member).await } else { std::future::pending().await } };
            // All arms are cancel-safe: they only tell that it is time to ask.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = parted => debug!(member = %self.member, "connection to the agent ended"),
                changed = self.pace.changed() => if changed.is_err() { return },
            }
            tokio::time::sleep_until(not_before).await;
        }
    }

    fn is_open(&self) -> bool {
        self.known.borrow().get(&self.member).is_some_and(|peer| matches!(peer.agent, Door::Open { .. }))
    }

    async fn ask(&self, me: Introduction) {
        let question = Question {
            version: VERSION,
            cluster: self.cluster.clone(),
            system_identifier: me.system_identifier,
            from: me.id,
            asks: Asks::Report,
        };
        let asked_at = self.clock.now();
        self.update(|peer| peer.asked_at = Some(asked_at));
        let answer = self.port.ask(&self.member, &question, ANSWER_WITHIN).await;
        let at = self.clock.now();
        match answer.map_err(Silence::from).and_then(|answer| self.sense(answer)) {
            Ok((from, report)) => self.update(|peer| {
                let heard = Heard { asked_at, at, from, report };
                peer.agent = peer.agent.after(Tried::Opened, at);
                // Looked at again when the agent's port refuses again.
                peer.postgres = Door::Unknown;
                peer.answer = Some(heard);
            }),
            Err(Silence { tried, why }) => {
                debug!(member = %self.member, why, "no answer");
                self.update(|peer| peer.agent = peer.agent.after(tried, at));
                if tried == Tried::Refused {
                    let knocked = self.port.knock(&self.member, KNOCK_WITHIN).await;
                    let at = self.clock.now();
                    self.update(|peer| peer.postgres = peer.postgres.after(knocked, at));
                }
            }
        }
    }

    /// What counts as an answer: a report of an agent whose loop comes round.
    fn sense(&self, answer: Answer) -> Result<(MemberId, Report), Silence> {
        let silent = |why: String| Silence { tried: Tried::Silent, why };
        match answer.says {
            Says::Report(report) if Duration::from_millis(report.loop_age_ms) > self.loop_patience => {
                Err(silent(format!("its loop has not come round for {} ms", report.loop_age_ms)))
            }
            Says::Report(report) => Ok((answer.from, *report)),
            Says::Refused { why } => Err(silent(why)),
            Says::Promised { .. } | Says::NotPromised { .. } | Says::Unknown => {
                Err(silent("answered something that is not known here".to_owned()))
            }
        }
    }

    fn update(&self, change: impl FnOnce(&mut Peer)) {
        let mut news = false;
        self.known.send_modify(|known| {
            let Some(peer) = known.get_mut(&self.member) else { return };
            let before = telling(peer);
            change(peer);
            news = telling(peer) != before;
        });
        if news {
            self.news.send_modify(|n| *n += 1);
        }
    }
}

/// What a decision may hang on, without what changes with every answer.
fn telling(peer: &Peer) -> impl PartialEq + use<> {
    use std::mem::discriminant as kind;
    let report = peer.answer.as_ref().map(|heard| {
        let report = &heard.report;
        let word = (heard.from.incarnation, report.highest_term, report.sealed_term);
        (word, kind(&report.promise), kind(&report.sealable))
    });
    (kind(&peer.agent), kind(&peer.postgres), report)
}

struct Silence {
    tried: Tried,
    why: String,
}

impl From<PeerError> for Silence {
    fn from(error: PeerError) -> Silence {
        let tried = match &error {
            PeerError::Refused { .. } => Tried::Refused,
            PeerError::Silent { .. } | PeerError::Foreign { .. } => Tried::Silent,
        };
        Silence { tried, why: error.to_string() }
    }
}

#[cfg(test)]
mod tests;
