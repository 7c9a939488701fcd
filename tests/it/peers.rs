//! The agent port over real sockets: the asking adapter against the API that answers.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgvigil::agent::answers::Answers;
use pgvigil::agent::state_file::StateFile;
use pgvigil::agent::status::Status;
use pgvigil::api::testing::{StandingClock, published};
use pgvigil::api::{Api, serve};
use pgvigil::config::{ApiConfig, MemberAddress, Secret};
use pgvigil::core::ClusterName;
use pgvigil::core::peers::{Answer, Asks, HolderSeen, Question, Says, Tried, VERSION};
use pgvigil::core::promise::Promise;
use pgvigil::core::testing::{Cluster, SYSTEM, cluster, id, idle, lag, name, secs};
use pgvigil::core::timeline::Term;
use pgvigil::core::view::HolderMemory;
use pgvigil::peers::HttpPeers;
use pgvigil::ports::{PeerError, Peers};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

/// The agent of member `b`, as its API answers.
struct Agent {
    address: SocketAddr,
    status: watch::Sender<Option<Arc<Status>>>,
    clock: Arc<StandingClock>,
    task: JoinHandle<()>,
    directory: tempfile::TempDir,
}

fn healthy() -> Cluster {
    cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(0)).sync(1, ["b", "c"])
}

/// The state file of `b`.
pub fn state(directory: &Path) -> Arc<Mutex<StateFile>> {
    let cluster = ClusterName::new("maas").unwrap();
    Arc::new(Mutex::new(StateFile::open(directory, &cluster, &name("b")).unwrap()))
}

async fn agent(token: Option<&str>) -> Agent {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = ApiConfig {
        listen: address,
        token: token.map(Secret::new),
        max_connections: 100,
        header_timeout: Duration::from_secs(5),
    };
    let (status, published_status) = watch::channel(Some(published(healthy().seen_by("b"), idle())));
    let clock = Arc::new(StandingClock::default());
    let cluster = ClusterName::new("maas").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let answers = Answers {
        cluster: cluster.clone(),
        state: state(directory.path()),
        status: published_status.clone(),
        clock: clock.clone(),
    };
    let api = Api {
        config,
        cluster,
        status: published_status,
        endpoint: watch::channel(None).1,
        requests: mpsc::channel(1).0,
        answers: Arc::new(answers),
        clock: clock.clone(),
    };
    let task = tokio::spawn(serve(api, listener, CancellationToken::new()));
    Agent { address, status, clock, task, directory }
}

/// `a` on the way to whoever listens there.
fn way_to(agent: SocketAddr, postgres: SocketAddr, token: Option<&str>) -> HttpPeers {
    let address =
        MemberAddress { name: name("b"), host: agent.ip().to_string(), port: postgres.port(), api_port: agent.port() };
    HttpPeers::to([address], token.map(Secret::new))
}

fn question() -> Question {
    Question {
        version: VERSION,
        cluster: ClusterName::new("maas").unwrap(),
        system_identifier: Some(SYSTEM),
        from: id("a"),
        asks: Asks::Report,
    }
}

async fn ask(peers: &HttpPeers, question: &Question) -> Result<Answer, PeerError> {
    peers.ask(&name("b"), question, PATIENCE).await
}

#[tokio::test]
async fn an_agent_answers_with_what_it_published_and_how_old_that_is() {
    let agent = agent(None).await;
    let peers = way_to(agent.address, agent.address, None);
    agent.clock.advance(secs(3));
    let answer = ask(&peers, &question()).await.unwrap();
    assert_eq!(answer.from, id("b"));
    let Says::Report(report) = answer.says else { panic!("{answer:?}") };
    assert_eq!(report.loop_age_ms, 3_000);
    assert!(matches!(report.holder, HolderSeen::Seen(seen) if seen.member == name("a") && seen.seq == 1));

    // Before its first round it has nothing to say: that is no answer.
    agent.status.send_replace(None);
    assert!(matches!(ask(&peers, &question()).await, Err(PeerError::Silent { .. })));
}

#[tokio::test]
async fn a_lost_agent_is_noticed_at_once_and_told_from_one_that_only_hangs() {
    let agent = agent(None).await;
    let peers = way_to(agent.address, agent.address, None);
    ask(&peers, &question()).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), peers.parted(&name("b"))).await.is_err(), "it is kept");
    assert_eq!(peers.knock(&name("b"), PATIENCE).await, Tried::Opened);
    agent.task.abort();
    let _ = agent.task.await;
    tokio::time::timeout(PATIENCE, peers.parted(&name("b"))).await.expect("its end is told");
    assert!(matches!(ask(&peers, &question()).await, Err(PeerError::Refused { .. })));
    assert_eq!(peers.knock(&name("b"), PATIENCE).await, Tried::Refused);

    // The kernel takes connections for a process that is stopped: only an answer of the application counts.
    let stopped = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let listener = TcpListener::bind(stopped).await.unwrap();
    let peers = way_to(stopped, stopped, None);
    let answer = peers.ask(&name("b"), &question(), Duration::from_millis(100)).await;
    assert!(matches!(answer, Err(PeerError::Silent { .. })), "{answer:?}");
    drop(listener);
}

/// S7: neither side believes the other before it knows whose it is.
#[tokio::test]
async fn strangers_are_told_apart() {
    let agent = agent(None).await;
    let peers = way_to(agent.address, agent.address, None);
    let strange = |change: &dyn Fn(&mut Question)| {
        let mut strange = question();
        change(&mut strange);
        strange
    };
    for question in [
        strange(&|q| q.cluster = ClusterName::new("other").unwrap()),
        strange(&|q| q.system_identifier = Some(SYSTEM + 1)),
    ] {
        assert!(matches!(ask(&peers, &question).await, Err(PeerError::Foreign { .. })), "{question:?}");
    }
    for question in
        [strange(&|q| q.from = id("z")), strange(&|q| q.version = VERSION + 1), strange(&|q| q.asks = Asks::Unknown)]
    {
        let says = ask(&peers, &question).await.unwrap().says;
        assert!(matches!(says, Says::Refused { .. }), "{question:?}: {says:?}");
    }
    // Somebody else's agent at the address of b.
    agent.status.send_replace(Some(published(healthy().seen_by("c"), idle())));
    assert!(matches!(ask(&peers, &question()).await, Err(PeerError::Foreign { .. })));
}

#[tokio::test]
async fn where_a_token_is_configured_agents_show_it_too() {
    let agent = agent(Some("secret")).await;
    for (token, right) in [(Some("secret"), true), (Some("guess"), false), (None, false)] {
        let answer = ask(&way_to(agent.address, agent.address, token), &question()).await;
        assert_eq!(answer.is_ok(), right, "{token:?}: {answer:?}");
        assert!(right || matches!(answer, Err(PeerError::Foreign { .. })), "{answer:?}");
    }
}

/// A promise is on disk before it is answered, to the leader that this member knows and to nobody else: without a token
/// anybody may ask.
#[tokio::test]
async fn a_promise_is_given_to_the_sitting_leader_only_and_is_on_disk_then() {
    let agent = agent(None).await;
    let mut view = healthy().seen_by("b");
    view.memory.holder = Some(HolderMemory {
        member: name("a"),
        term: Term(4),
        agent_answered: true,
        postgres_answered: true,
        wal: None,
        looked_at: None,
    });
    agent.status.send_replace(Some(published(view, idle())));
    let peers = way_to(agent.address, agent.address, None);
    let wants = |from: &str, to: &str, term: u64, length_ms: u64| {
        let promise = Promise { to: id(to), term: Term(term), length_ms };
        Question { from: id(from), asks: Asks::Promise(promise), ..question() }
    };
    let file = || std::fs::read_to_string(agent.directory.path().join("state.json")).unwrap();
    for (question, why) in [
        (wants("c", "c", 4, 8_162), "c is not the leader"),
        (wants("c", "a", 4, 8_162), "for somebody else"),
        (wants("c", "c", 40, 8_162), "a term that nobody knows"),
        (wants("a", "a", 4, 100_000_000), "for a day"),
    ] {
        let says = ask(&peers, &question).await.unwrap().says;
        assert!(matches!(says, Says::Refused { .. }), "{why}: {says:?}");
    }
    assert!(file().contains("\"promise\": null"), "{}", file());
    let says = ask(&peers, &wants("a", "a", 4, 8_162)).await.unwrap().says;
    assert!(matches!(says, Says::Promised { .. }), "{says:?}");
    assert!(file().contains("\"length_ms\": 8162"), "{}", file());
    let says = ask(&peers, &wants("a", "a", 3, 8_162)).await.unwrap().says;
    assert!(matches!(says, Says::NotPromised { .. } | Says::Refused { .. }), "{says:?}");
}
