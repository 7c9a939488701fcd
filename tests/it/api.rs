//! The API's edges over real sockets: codes, bytes, limits, and who may do what.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pgvigil::agent::answers::Answers;
use pgvigil::agent::status::Status;
use pgvigil::api::testing::{StandingClock, published};
use pgvigil::api::{Accepted, Api, ApiRequest, ROUTES, Refusal, openapi_document, serve};
use pgvigil::config::{ApiConfig, Secret};
use pgvigil::core::records::{ClusterRecords, HistoryRecord, Keyed, Operation, Outcome, Request, TimelineReservation};
use pgvigil::core::testing::{Cluster, cluster, idle, lag, secs};
use pgvigil::core::view::{Store, View};
use pgvigil::core::{ClusterName, Lsn, Term, TimelineId};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Everything in these tests is over long before; what hangs fails instead.
const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    address: SocketAddr,
    status: watch::Sender<Option<Arc<Status>>>,
    requests: mpsc::Receiver<ApiRequest>,
    clock: Arc<StandingClock>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Reply {
    status: u16,
    headers: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|why| panic!("{why}: {}", self.body))
    }
}

fn healthy() -> Cluster {
    cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(2_000)).sync(1, ["b"])
}

async fn start(view: View) -> Server {
    start_with(view, |_| {}).await
}

async fn start_with(view: View, change: impl FnOnce(&mut ApiConfig)) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut config =
        ApiConfig { listen: address, token: None, max_connections: 100, header_timeout: Duration::from_millis(500) };
    change(&mut config);
    let (status, published_status) = watch::channel(Some(published(view, idle())));
    let (ask, requests) = mpsc::channel(8);
    let clock = Arc::new(StandingClock::default());
    let api = Api {
        endpoint: watch::channel(None).1,
        config,
        cluster: ClusterName::new("maas").unwrap(),
        answers: Arc::new(Answers {
            cluster: ClusterName::new("maas").unwrap(),
            state: crate::peers::state(tempfile::tempdir().unwrap().path()),
            status: published_status.clone(),
            clock: clock.clone(),
        }),
        status: published_status,
        requests: ask,
        clock: clock.clone(),
    };
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(serve(api, listener, shutdown.clone()));
    Server { address, status, requests, clock, shutdown, task }
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes, reads until the server closes.
    async fn raw(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect().await;
        let _ = stream.write_all(bytes.as_ref()).await;
        read_to_end(&mut stream).await
    }

    async fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        parse(&self.raw(format!("{head}{body}")).await)
    }

    async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, "", "").await
    }

    async fn post(&self, path: &str, body: Value) -> Reply {
        self.send("POST", path, "", &body.to_string()).await
    }

    fn publish(&self, view: View) {
        self.status.send_replace(Some(published(view, idle())));
    }

    /// The agent's part: takes the next request and answers it.
    async fn accept(&mut self, answer: Result<Accepted, Refusal>) -> (Operation, String) {
        let request = tokio::time::timeout(PATIENCE, self.requests.recv()).await.unwrap().unwrap();
        let _ = request.answer.send(answer);
        (request.what, request.id)
    }

    /// The agent answers nothing: whatever arrives stays here.
    fn nothing_asked(&mut self) -> bool {
        self.requests.try_recv().is_err()
    }
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    // A reset after the answer is an end like any other.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut text)).await.expect("the server closes");
    String::from_utf8_lossy(&text).into_owned()
}

fn parse(text: &str) -> Reply {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("{head}"));
    Reply { status, headers: head.to_ascii_lowercase(), body: body.to_owned() }
}

fn metric(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

fn with_request(id: &str, outcome: Option<Outcome>) -> View {
    let value = Request {
        id: id.to_owned(),
        what: Operation::Switchover { to: None },
        asked_by: "test".to_owned(),
        at_unix_ms: 1,
        timeout_ms: 1_000,
        began: None,
        outcome,
        force: None,
    };
    let add = |records: &mut ClusterRecords| {
        records.requests.insert(id.to_owned(), Keyed { revision: 1, value });
    };
    healthy().records(add).seen_by("a")
}

// === Health checks ===

#[tokio::test]
async fn balancers_are_answered_as_patroni_answers() {
    for (who, primary, replica) in [("a", 200, 503), ("b", 503, 200)] {
        let server = start(healthy().seen_by(who)).await;
        for (path, expected) in
            [("/", primary), ("/primary", primary), ("/replica?lag=1MB", replica), ("/read-only", 200)]
        {
            assert_eq!(server.get(path).await.status, expected, "{who} {path}");
            for method in ["OPTIONS", "HEAD"] {
                let reply = server.send(method, path, "", "").await;
                assert_eq!((reply.status, reply.body.as_str()), (expected, ""), "{who} {method} {path}");
            }
            // HAProxy without `http-check send ver`: HTTP/1.0, no Host header.
            let old = server.raw(format!("OPTIONS {path} HTTP/1.0\r\n\r\n")).await;
            assert_eq!(parse(&old).status, expected, "{who} {path}");
        }
    }
}

#[tokio::test]
async fn a_refusal_says_why_and_shows_the_node() {
    let server = start(healthy().seen_by("c")).await;
    let reply = server.get("/replica?lag=1kB").await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.json()["reason"], "2000 bytes behind, 1024 allowed");
    assert_eq!(reply.json()["role"], "replica");
    let wrong = server.get("/replica?lag=lots").await;
    assert_eq!(wrong.status, 400);
    assert!(wrong.json()["error"].as_str().unwrap().contains("lots"));
}

#[tokio::test]
async fn a_loop_that_hangs_or_never_began_is_not_healthy() {
    let server = start(healthy().seen_by("a")).await;
    assert_eq!(server.get("/primary").await.status, 200);
    server.clock.advance(secs(9));
    for path in ["/primary", "/read-only", "/health", "/liveness", "/readiness"] {
        assert_eq!(server.get(path).await.status, 503, "{path}");
    }
    server.status.send_replace(None);
    for path in ["/primary", "/liveness", "/patroni", "/cluster", "/v1/status", "/v1/explain", "/v1/decisions"] {
        assert_eq!(server.get(path).await.status, 503, "{path}");
    }
    assert_eq!(server.get("/metrics").await.status, 200);
}

#[tokio::test]
async fn paths_are_exact() {
    let server = start(healthy().seen_by("a")).await;
    for path in ["/primaryx", "/primary/", "/replica/x", "/v1", "/v1/requests", "/x?/primary", "//primary", "/PRIMARY"]
    {
        let reply = server.get(path).await;
        assert_eq!(reply.status, 404, "{path}");
        assert!(reply.json()["hint"].is_string());
    }
    assert_eq!(server.send("POST", "/primary", "", "").await.status, 405);
    assert_eq!(server.send("OPTIONS", "/cluster", "", "").await.status, 405);
    assert_eq!(server.send("GET", "/v1/switchover", "", "").await.status, 405);
    assert_eq!(server.send("HEAD", "/cluster", "", "").await.status, 200);
}

// === Documents ===

#[tokio::test]
async fn patronis_documents_have_patronis_shape() {
    let server = start(healthy().seen_by("a")).await;
    let node = server.get("/patroni").await.json();
    assert_eq!(node["state"], "running");
    assert_eq!(node["role"], "primary");
    assert_eq!(node["server_version"], 150018);
    assert!(node["xlog"]["location"].is_u64());
    assert_eq!(node["patroni"], json!({"version": "0.1.0", "scope": "maas", "name": "a", "software": "pgvigil"}));
    assert_eq!(node["replication"][0]["member"], "b");
    assert_eq!(node["cluster_unlocked"], false);

    let cluster = server.get("/cluster").await.json();
    assert_eq!(cluster["scope"], "maas");
    let summary: Vec<_> =
        cluster["members"].as_array().unwrap().iter().map(|m| (&m["name"], &m["role"], &m["lag"])).collect();
    let expected = [
        (json!("a"), json!("leader"), Value::Null),
        (json!("b"), json!("sync_standby"), json!(0)),
        (json!("c"), json!("replica"), json!(2000)),
    ];
    assert_eq!(summary, expected.iter().map(|(a, b, c)| (a, b, c)).collect::<Vec<_>>());
    assert_eq!(cluster["members"][1]["api_url"], "http://b.example:8008/patroni");
    assert_eq!(server.get("/config").await.json()["synchronous_mode"], "quorum");
    assert_eq!(server.send("PATCH", "/config", "", "{}").await.status, 501);
    assert_eq!(server.get("/history").await.json(), json!([]));
}

#[tokio::test]
async fn the_history_tells_who_took_over_where_and_why() {
    let change = |records: &mut ClusterRecords| {
        let reservation = TimelineReservation { term: Term(4), parent: TimelineId(1), switch: Lsn(0x100) };
        records.timelines.insert(TimelineId(3), reservation);
        let first = HistoryRecord {
            term: Term(1),
            leader: "b".parse().unwrap(),
            timeline: TimelineId(1),
            switch: None,
            reason: "created the cluster".to_owned(),
            at_unix_ms: 0,
            phases_ms: Default::default(),
        };
        let second = HistoryRecord {
            term: Term(4),
            leader: "a".parse().unwrap(),
            timeline: TimelineId(3),
            switch: Some(Lsn(0x100)),
            reason: "b was silent".to_owned(),
            ..first.clone()
        };
        records.history.extend([(Term(1), first), (Term(4), second)]);
    };
    let server = start(healthy().records(change).seen_by("b")).await;
    let expected = json!([[1, 256, "b was silent", "1970-01-01T00:00:00.000000+00:00", "a"]]);
    assert_eq!(server.get("/history").await.json(), expected);
}

#[tokio::test]
async fn waiting_for_outcomes_does_not_take_every_connection() {
    let server = start_with(with_request("r1", None), |config| config.max_connections = 8).await;
    let mut waiting = Vec::new();
    for _ in 0..2 {
        let mut stream = server.connect().await;
        stream.write_all(b"GET /v1/requests/r1?wait_ms=60000 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        waiting.push(stream);
    }
    // Both are under way; each look at the metrics is a request more.
    let mut looks = 1.0;
    while metric(&server.get("/metrics").await.body, "pgvigil_api_requests_total ") < 2.0 + looks {
        looks += 1.0;
    }
    for _ in 0..20 {
        assert_eq!(server.get("/v1/requests/r1?wait_ms=60000").await.json()["state"], "waiting");
        assert_eq!(server.get("/primary").await.status, 200);
    }
}

#[tokio::test]
async fn without_the_store_the_last_reading_is_shown_and_nothing_is_claimed() {
    let mut view = healthy().seen_by("b");
    let server = start(view.clone()).await;
    assert_eq!(server.get("/sync").await.status, 200);
    view.store = Store::Unknown { why: "no quorum".to_owned(), since: view.now };
    server.publish(view);
    assert_eq!(server.get("/cluster").await.status, 503);
    assert_eq!(server.get("/sync").await.status, 503);
    assert_eq!(server.get("/replica").await.status, 200);
    let status = server.get("/v1/status").await.json();
    assert_eq!(status["store"]["readable"], false);
    assert_eq!(status["members"][0]["role"], "leader");
}

#[tokio::test]
async fn the_status_and_the_decisions_are_versioned_json() {
    let server = start(healthy().seen_by("a")).await;
    let status = server.get("/v1/status").await.json();
    assert_eq!(status["version"], 1);
    assert_eq!(status["leader"]["member"], "a");
    assert_eq!(status["leader"]["lease_remaining_ms"], 8_000);
    assert_eq!(status["durability"]["degraded"], false);
    assert_eq!(status["warnings"], json!([]));
    let decisions = server.get("/v1/decisions").await.json();
    assert_eq!(decisions[0]["rule"], "follower");
    assert!(decisions[0].get("view").is_none());
    // What `explain --replay` reads back.
    let full = server.get("/v1/decisions?full=true&limit=1").await.json();
    let view: View = serde_json::from_value(full[0]["view"].clone()).unwrap();
    assert_eq!(view, healthy().seen_by("a"));
    assert_eq!(server.get("/v1/decisions?full=perhaps").await.status, 400);
    assert_eq!(server.get("/v1/explain").await.json()["checks"]["/primary"]["pass"], true);
}

#[tokio::test]
async fn metrics_are_openmetrics() {
    let server = start(healthy().seen_by("b")).await;
    let reply = server.get("/metrics").await;
    assert!(reply.headers.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"));
    assert!(reply.body.ends_with("# EOF\n"));
    let mut families = std::collections::BTreeMap::new();
    for line in reply.body.lines().filter(|line| *line != "# EOF") {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(families.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let name = series.split('{').next().unwrap();
            let family = name.strip_suffix("_total").or(name.strip_suffix("_info")).unwrap_or(name);
            assert!(families.contains_key(family) || families.contains_key(name), "{line} has no TYPE");
            assert!(name.starts_with("pgvigil_"));
        }
    }
    assert!(families.len() > 40);
}

#[tokio::test]
async fn the_description_is_the_golden_file_and_the_router_serves_all_of_it() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    let document = openapi_document();
    let text = serde_json::to_string_pretty(&document).unwrap() + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &text).unwrap();
    }
    let stored = std::fs::read_to_string(&golden).unwrap_or_default();
    assert!(stored == text, "docs/openapi.json is not what the routes say; run with UPDATE_GOLDEN=1 and read the diff");

    let server = start_with(healthy().seen_by("a"), |config| config.token = Some(Secret::new("t"))).await;
    assert_eq!(server.get("/v1/openapi.json").await.json(), document);
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in ["get", "head", "options", "post", "put", "patch", "delete"] {
            let listed = methods.get(method).is_some() || method == "head" && methods.get("get").is_some();
            // A body that no operation takes: the router is asked, nothing is done.
            let path = path.replace("{id}", "none");
            let reply = server.send(&method.to_ascii_uppercase(), &path, "Authorization: Bearer t\r\n", "[]").await;
            assert_eq!(reply.status == 405, !listed, "{method} {path}: {}", reply.status);
        }
    }
    assert_eq!(
        document["paths"].as_object().unwrap().len(),
        ROUTES.iter().map(|r| r.path).collect::<std::collections::BTreeSet<_>>().len()
    );
}

// === Operations ===

#[tokio::test]
async fn an_operation_is_accepted_and_followed_to_its_outcome() {
    let mut server = start(healthy().seen_by("a")).await;
    let body = json!({"to": "b", "request_id": "r1"});
    let (reply, (what, id)) = tokio::join!(start_post(&server, "/v1/switchover", body.clone()), async {
        let request = server.requests.recv().await.unwrap();
        let _ = request.answer.send(Ok(Accepted::New));
        (request.what, request.id)
    });
    assert_eq!((reply.status, id.as_str()), (202, "r1"));
    assert_eq!(what, Operation::Switchover { to: Some("b".parse().unwrap()) });
    assert!(reply.headers.contains("location: /v1/requests/r1"));
    // Known before the store's next reading shows it, and the same id is the same request.
    assert_eq!(server.get("/v1/requests/r1").await.json()["state"], "accepted");
    assert_eq!(server.post("/v1/switchover", body).await.status, 202);
    assert_eq!(server.post("/v1/switchover", json!({"to": "c", "request_id": "r1"})).await.status, 409);
    assert!(server.nothing_asked());

    server.publish(with_request("r1", None));
    assert_eq!(server.get("/v1/requests/r1").await.json()["state"], "waiting");
    let waiting = server.get("/v1/requests/r1?wait_ms=20000");
    let done = async {
        server.publish(with_request("r1", Some(Outcome::Done { message: "b leads".to_owned() })));
    };
    let (reply, ()) = tokio::join!(waiting, done);
    assert_eq!(reply.json()["state"], "done");
    assert_eq!(server.get("/v1/requests/other").await.status, 404);
}

/// As `Server::post`, borrowing only what the agent's side does not need.
fn start_post(server: &Server, path: &str, body: Value) -> impl Future<Output = Reply> + use<> {
    let (address, path) = (server.address, path.to_owned());
    async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let body = body.to_string();
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        parse(&read_to_end(&mut stream).await)
    }
}

#[tokio::test]
async fn what_the_agent_says_becomes_the_code() {
    let mut server = start(healthy().seen_by("a")).await;
    let cases = [
        (Ok(Accepted::New), 202),
        (Ok(Accepted::Known), 202),
        (Err(Refusal::IdTaken), 409),
        (Err(Refusal::NotPossible("b is behind".to_owned())), 412),
        (Err(Refusal::Unavailable("no quorum".to_owned())), 503),
        (Err(Refusal::Unknown("no answer".to_owned())), 503),
    ];
    for (answer, expected) in cases {
        let asked = tokio::spawn(start_post(&server, "/v1/restart", json!({"member": "b"})));
        let (_, id) = server.accept(answer).await;
        let reply = asked.await.unwrap();
        assert_eq!(reply.status, expected, "{}", reply.body);
        assert!(expected == 412 || reply.body.contains(&id), "{} does not name {id}", reply.body);
    }
    let asked = tokio::spawn(start_post(&server, "/v1/reinit", json!({"member": "b"})));
    drop(server.requests.recv().await.unwrap());
    let reply = asked.await.unwrap();
    assert_eq!(reply.status, 503);
    assert!(reply.body.contains("not known whether"), "{}", reply.body);
}

#[tokio::test]
async fn patronis_switchover_answers_when_it_is_over() {
    let cases = [
        (Outcome::Done { message: "b leads".to_owned() }, 200),
        (Outcome::Refused { message: "b is behind".to_owned() }, 412),
        (Outcome::PutBack { message: "too slow".to_owned() }, 503),
        (Outcome::Unknown { message: "died".to_owned() }, 503),
    ];
    for (outcome, expected) in cases {
        let mut server = start(healthy().seen_by("a")).await;
        let asked = tokio::spawn(start_post(&server, "/switchover", json!({"leader": "a", "candidate": "b"})));
        let (what, id) = server.accept(Ok(Accepted::New)).await;
        assert_eq!(what, Operation::Switchover { to: Some("b".parse().unwrap()) });
        server.publish(with_request(&id, None));
        server.publish(with_request(&id, Some(outcome)));
        assert_eq!(asked.await.unwrap().status, expected);
    }
}

#[tokio::test]
async fn impossible_operations_are_refused_before_the_agent_hears_of_them() {
    let mut server = start(healthy().seen_by("a")).await;
    let cases = [
        ("/switchover", json!({}), 400),
        ("/switchover", json!({"leader": "b"}), 412),
        ("/switchover", json!({"leader": "a", "candidate": "x"}), 412),
        ("/switchover", json!({"leader": "a", "candidate": "a"}), 400),
        ("/switchover", json!({"leader": "a", "scheduled_at": "2030-01-01T00:00+00:00"}), 501),
        ("/failover", json!({}), 400),
        ("/failover", json!({"candidate": "x"}), 412),
        ("/restart", json!({"role": "replica"}), 503),
        ("/restart", json!({"role": "king"}), 400),
        ("/restart", json!({"restart_pending": true}), 503),
        ("/restart", json!({"schedule": "tomorrow"}), 501),
        ("/v1/switchover", json!({"to": "x"}), 400),
        ("/v1/switchover", json!({"to": "not a name"}), 400),
        ("/v1/switchover", json!({"too": "b"}), 400),
        ("/v1/switchover", json!({"request_id": "../leader"}), 400),
        ("/v1/switchover", json!({"timeout_ms": 1}), 400),
        ("/v1/restart", json!({}), 400),
        ("/v1/reinit", json!(["b"]), 400),
    ];
    for (path, body, expected) in cases {
        let reply = server.post(path, body.clone()).await;
        assert_eq!(reply.status, expected, "{path} {body}: {}", reply.body);
        assert!(reply.json()["error"].is_string());
    }
    for body in ["{", "\u{0}", "{\"to\": \"b\"} trailing", "nul"] {
        assert_eq!(server.send("POST", "/v1/switchover", "", body).await.status, 400, "{body}");
    }
    assert_eq!(server.send("DELETE", "/switchover", "", "").await.status, 404);
    assert!(server.nothing_asked());
}

#[tokio::test]
async fn changes_need_the_token() {
    let mut server = start_with(healthy().seen_by("a"), |config| config.token = Some(Secret::new("secret"))).await;
    for (headers, expected) in
        [("", 401), ("Authorization: Bearer wrong\r\n", 401), ("Authorization: Basic secret\r\n", 401)]
    {
        for path in ["/v1/switchover", "/switchover", "/unknown"] {
            let reply = server.send("POST", path, headers, "{}").await;
            assert_eq!(reply.status, expected, "{path} {headers}");
            assert!(reply.headers.contains("www-authenticate: bearer"));
        }
    }
    assert_eq!(server.get("/primary").await.status, 200);
    assert_eq!(server.send("POST", "/v1/restart", "Authorization: Bearer secret\r\n", "{}").await.status, 400);
    assert!(server.nothing_asked());
}

// === Strangers ===

#[tokio::test]
async fn rubbish_is_refused_and_the_server_lives() {
    let server = start(healthy().seen_by("a")).await;
    let giant_header = format!("GET /primary HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let giant_path = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
    let many_headers = format!("GET /primary HTTP/1.1\r\n{}\r\n", "X: x\r\n".repeat(1_000));
    let tls = "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}".to_owned();
    let smuggled =
        "POST /v1/switchover HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!".to_owned();
    for bytes in
        [giant_header, giant_path, many_headers, tls, smuggled, "\0\0\0\0\r\n\r\n".to_owned(), "GET\r\n\r\n".to_owned()]
    {
        let answer = server.raw(&bytes).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        assert_eq!(server.get("/primary").await.status, 200);
    }
}

#[tokio::test]
async fn large_and_slow_bodies_are_cut_off() {
    let server = start(healthy().seen_by("a")).await;
    let large = "x".repeat(65 * 1024);
    assert_eq!(server.send("POST", "/v1/switchover", "", &large).await.status, 413);
    let chunk = format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len());
    let chunked = format!(
        "POST /v1/switchover HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}"
    );
    assert_eq!(parse(&server.raw(chunked).await).status, 413);
    let slow = "POST /v1/switchover HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 10\r\n\r\n{";
    assert_eq!(parse(&server.raw(slow).await).status, 408);
}

#[tokio::test]
async fn half_a_head_and_a_kept_connection_end_by_themselves() {
    let server = start(healthy().seen_by("a")).await;
    assert_eq!(server.raw("GET /primary HTTP/1.1\r\nHos").await, "");
    assert_eq!(server.raw("").await, "");
    // Two requests on one connection, then silence.
    let request = "GET /primary HTTP/1.1\r\nHost: x\r\n\r\n";
    let answers = server.raw(format!("{request}{request}")).await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 2, "{answers}");
}

#[tokio::test]
async fn a_thousand_silent_connections_starve_nobody() {
    let server = start_with(healthy().seen_by("a"), |config| {
        config.max_connections = 50;
        config.header_timeout = Duration::from_secs(3600);
    })
    .await;
    let mut silent = Vec::new();
    for n in 0..1_000 {
        silent.push(server.connect().await);
        if n % 100 == 0 {
            assert_eq!(server.get("/primary").await.status, 200, "after {n}");
        }
    }
    assert_eq!(server.get("/primary").await.status, 200);
    let metrics = server.get("/metrics").await.body;
    assert!(metric(&metrics, "pgvigil_api_connections ") <= 50.0);
    assert!(metric(&metrics, "pgvigil_api_connections_evicted_total ") >= 950.0);
    // The oldest were closed.
    assert_eq!(read_to_end(&mut silent[0]).await, "");
}

#[tokio::test]
async fn the_end_is_bounded_whoever_is_connected() {
    let mut server =
        start_with(healthy().seen_by("a"), |config| config.header_timeout = Duration::from_secs(3600)).await;
    let _silent = server.connect().await;
    let mut half = server.connect().await;
    half.write_all(b"GET /pri").await.unwrap();
    let waiting = tokio::spawn(start_post(&server, "/switchover", json!({"leader": "a"})));
    server.accept(Ok(Accepted::New)).await;
    server.shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(5), &mut server.task).await.expect("ends in time").unwrap();
    let reply = waiting.await.unwrap();
    assert_eq!(reply.status, 503);
    assert!(reply.body.contains("status unknown"), "{}", reply.body);
}

/// The configuration that Patroni's documentation teaches, and the same with HTTP/1.1 and a lag limit. Only where HAProxy
/// is installed.
#[tokio::test]
async fn haproxy_finds_the_primary_and_the_standbys() {
    if std::process::Command::new("haproxy").arg("-v").output().is_err() {
        eprintln!("haproxy is not installed: its checks are not tried");
        return;
    }
    let servers =
        [start(healthy().seen_by("a")).await, start(healthy().seen_by("b")).await, start(healthy().seen_by("c")).await];
    let lines: String = ["a", "b", "c"]
        .iter()
        .zip(&servers)
        .map(|(n, s)| format!("  server {n} {0} check port {1}\n", s.address, s.address.port()))
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = (directory.path().join("haproxy.cfg"), directory.path().join("stats"));
    let backend = |name: &str, check: &str| {
        format!(
            "backend {name}\n  {check}\n  http-check expect status 200\n  default-server inter 100ms fall 1 rise 1\n{lines}"
        )
    };
    let config = [
        format!("global\n  stats socket {} mode 600\n", socket.display()),
        "defaults\n  mode tcp\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\n  timeout check 1s\n"
            .to_owned(),
        backend("primary", "option httpchk OPTIONS /primary"),
        backend("replica", "option httpchk\n  http-check send meth GET uri /replica?lag=1kB ver HTTP/1.1 hdr Host x"),
        backend("sync", "option httpchk HEAD /sync"),
    ];
    std::fs::write(&file, config.concat()).unwrap();
    let mut haproxy = tokio::process::Command::new("haproxy")
        .arg("-db")
        .arg("-f")
        .arg(&file)
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let expected = [
        ("primary", "a", "UP"),
        ("primary", "b", "DOWN"),
        ("primary", "c", "DOWN"),
        ("replica", "a", "DOWN"),
        ("replica", "b", "UP"),
    ];
    let expected = expected.into_iter().chain([
        ("replica", "c", "DOWN"),
        ("sync", "a", "DOWN"),
        ("sync", "b", "UP"),
        ("sync", "c", "DOWN"),
    ]);
    let expected: Vec<_> = expected.map(|(b, s, state)| (format!("{b}/{s}"), state.to_owned())).collect();
    let seen = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let states = haproxy_states(&socket).await;
            if states == expected {
                return;
            }
        }
    };
    if tokio::time::timeout(PATIENCE, seen).await.is_err() {
        panic!("haproxy sees {:?}", haproxy_states(&socket).await);
    }
    haproxy.kill().await.unwrap();
}

/// `backend/server` and its state, without the aggregates.
async fn haproxy_states(socket: &Path) -> Vec<(String, String)> {
    let Ok(mut stream) = tokio::net::UnixStream::connect(socket).await else { return Vec::new() };
    stream.write_all(b"show stat\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let rows = text.lines().filter(|line| !line.starts_with('#')).map(|line| line.split(',').collect::<Vec<_>>());
    let rows = rows.filter(|row| row.len() > 17 && !["FRONTEND", "BACKEND"].contains(&row[1]));
    // The state may be followed by `1/2` while it is about to change.
    rows.map(|row| (format!("{}/{}", row[0], row[1]), row[17].split(' ').next().unwrap().to_owned())).collect()
}
