//! The watch over a port whose answers a test gives, and over real sockets with the real answering side.

use std::sync::Mutex;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;
use crate::core::Moment;
use crate::core::names::Incarnation;
use crate::core::peers::{HolderSeen, Promise, Sealable};
use crate::core::timeline::Term;

fn timings() -> Timings {
    Timings {
        heartbeat: Duration::from_secs(1),
        ttl: Duration::from_secs(8),
        kill_budget: Duration::from_secs(1),
        renewal_timeout: Duration::from_secs(2),
    }
}

fn name(text: &str) -> MemberName {
    MemberName::new(text).unwrap()
}

fn report(loop_age_ms: u64) -> Says {
    Says::Report(Box::new(Report {
        boot_id: "boot".to_owned(),
        highest_term: Term(4),
        sealed_term: Term(4),
        holder: HolderSeen::Unknown { why: "not asked here".to_owned() },
        promise: Promise::Free,
        sealable: Sealable::Yes,
        loop_age_ms,
    }))
}

/// What the other side does next, and where its connection stands.
struct Scripted {
    next: Arc<Mutex<Next>>,
    up: watch::Receiver<bool>,
    asked: mpsc::UnboundedSender<()>,
}

#[derive(Clone)]
enum Next {
    Says(Says),
    Refuses(Tried),
    Silent,
}

#[async_trait]
impl Peers for Scripted {
    async fn ask(&self, member: &MemberName, question: &Question, _within: Duration) -> Result<Answer, PeerError> {
        let _ = self.asked.send(());
        let next = self.next.lock().unwrap().clone();
        match next {
            Next::Says(says) => Ok(Answer {
                version: VERSION,
                cluster: question.cluster.clone(),
                system_identifier: question.system_identifier,
                from: MemberId { name: member.clone(), incarnation: Incarnation(1) },
                says,
            }),
            Next::Refuses(_) => Err(PeerError::Refused { member: member.clone() }),
            Next::Silent => Err(PeerError::Silent { member: member.clone(), why: "test".to_owned() }),
        }
    }

    async fn knock(&self, _: &MemberName, _: Duration) -> Tried {
        match &*self.next.lock().unwrap() {
            Next::Refuses(postgres) => *postgres,
            Next::Says(_) | Next::Silent => Tried::Silent,
        }
    }

    async fn parted(&self, _: &MemberName) {
        let _ = self.up.clone().wait_for(|up| !up).await;
    }

    fn separate(&self) -> Box<dyn Peers> {
        unreachable!("the watch has its own")
    }
}

/// Goes with tokio's paused time.
struct Ticking(Instant);

impl Clock for Ticking {
    fn now(&self) -> Moment {
        Moment::at(1_000_000_000_000 + u64::try_from(self.0.elapsed().as_nanos()).unwrap())
    }

    fn unix_ms(&self) -> u64 {
        0
    }
}

struct Scene {
    watch: PeerWatch,
    next: Arc<Mutex<Next>>,
    up: watch::Sender<bool>,
    asked: mpsc::UnboundedReceiver<()>,
    task: JoinHandle<()>,
}

impl Scene {
    fn new(next: Next) -> Scene {
        let next = Arc::new(Mutex::new(next));
        let (up, up_rx) = watch::channel(true);
        let (asked_tx, asked) = mpsc::unbounded_channel();
        let port = Box::new(Scripted { next: next.clone(), up: up_rx, asked: asked_tx });
        let clock = Arc::new(Ticking(Instant::now()));
        let cluster = ClusterName::new("maas").unwrap();
        let (watch, mut tasks) = PeerWatch::new(port, cluster, vec![name("b")], clock, timings());
        let id = MemberId { name: name("a"), incarnation: Incarnation(9) };
        watch.introduce(Introduction { id, system_identifier: Some(7) });
        let task = tokio::spawn(tasks.remove(0).run());
        Scene { watch, next, up, asked, task }
    }

    fn then(&self, next: Next) {
        *self.next.lock().unwrap() = next;
    }

    /// After so long, with everything done that was due.
    async fn after(&self, ms: u64) -> Peer {
        tokio::time::sleep(Duration::from_millis(ms)).await;
        self.watch.known()[&name("b")].clone()
    }

    fn questions(&mut self) -> usize {
        std::iter::from_fn(|| self.asked.try_recv().ok()).count()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn everybody_is_asked_each_heartbeat_and_as_often_as_the_loop_wants() {
    let mut scene = Scene::new(Next::Says(report(10)));
    let peer = scene.after(3_500).await;
    assert_eq!(scene.questions(), 4);
    assert!(matches!(peer.agent, Door::Open { .. }) && peer.answer.is_some());
    scene.watch.pace(Duration::from_millis(100));
    scene.after(1_050).await;
    assert_eq!(scene.questions(), 11, "the new pace counts at once");
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_followed_up_at_once() {
    let mut scene = Scene::new(Next::Says(report(10)));
    let mut news = scene.watch.changes();
    scene.after(100).await;
    scene.questions();
    news.mark_unchanged();
    scene.then(Next::Refuses(Tried::Refused));
    scene.up.send_replace(false);
    let peer = scene.after(50).await;
    assert!(scene.questions() >= 1);
    assert!(peer.agent.refuses_since().is_some() && peer.postgres.refuses_since().is_some());
    assert!(news.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn connections_that_end_at_once_do_not_make_it_spin() {
    let mut scene = Scene::new(Next::Says(report(10)));
    scene.up.send_replace(false);
    scene.after(1_000).await;
    assert!(scene.questions() <= 102);
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_loop_is_stuck_does_not_answer() {
    let scene = Scene::new(Next::Says(report(10)));
    let before = scene.after(100).await.answer.unwrap();
    scene.then(Next::Says(report(5_001)));
    let peer = scene.after(2_000).await;
    assert!(matches!(peer.agent, Door::Silent { .. }), "{peer:?}");
    assert_eq!(peer.answer.unwrap().at, before.at);
}

#[tokio::test(start_paused = true)]
async fn a_postgresql_that_still_listens_is_told_from_one_that_does_not() {
    let scene = Scene::new(Next::Refuses(Tried::Opened));
    let peer = scene.after(1_000).await;
    assert!(peer.agent.refuses_since().is_some());
    assert!(matches!(peer.postgres, Door::Open { .. }));
    scene.then(Next::Refuses(Tried::Refused));
    let since = scene.after(1_000).await.postgres.refuses_since().unwrap();
    assert!(since.since(peer.agent.refuses_since().unwrap()) >= Duration::from_millis(900));
    // The host goes away: no answer is not a refusal.
    scene.then(Next::Silent);
    assert_eq!(scene.after(1_500).await.agent.refuses_since(), None);
}
