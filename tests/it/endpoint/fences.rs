//! When nothing may pass: deadline, hold, the agent's word, another term; and which answers wait for a barrier.

use pgvigil::guardian::page::GateWord;

use super::*;

/// The client's connection is reset: an error, not an orderly end, and nothing of what the backend said comes.
async fn is_reset(client: &mut Peer) {
    let mut rest = Vec::new();
    let read = timeout(PATIENCE, client.stream.read_to_end(&mut rest)).await.expect("still open");
    assert_eq!(rest, b"");
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn idle_clients_are_closed_at_the_deadline() {
    let endpoint = Endpoint::start();
    let page = endpoint.leads();
    let (mut client, _backend, _) = endpoint.session().await;
    extend(&page, SECOND / 20);
    // Told like a renewal: the watcher looks when it had planned to, so the old deadline has to be replaced by its word.
    endpoint.routes.add_page(Arc::new(Page::create(2).unwrap().0));
    is_reset(&mut client).await;
    assert_eq!(endpoint.counters.report().cut, 1);
}

#[tokio::test]
async fn nothing_is_written_to_a_client_after_the_deadline() {
    let endpoint = Endpoint::start();
    let page = endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&query("SELECT 1")).await;
    backend.message().await;
    extend(&page, 0);
    backend.send(&[complete("SELECT 1"), ready(b'I')].concat()).await;
    is_reset(&mut client).await;
}

#[tokio::test]
async fn the_agents_word_shuts_the_gate_before_anything_else_is_written() {
    let endpoint = Endpoint::start();
    let page = endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&query("SELECT 1")).await;
    backend.message().await;
    page.write_gate(GateWord::Shut { term: 4 });
    backend.send(&[complete("SELECT 1"), ready(b'I')].concat()).await;
    is_reset(&mut client).await;
}

#[tokio::test]
async fn nothing_passes_in_either_direction_past_the_softer_deadline() {
    // Schedule 13: reads, notifications and unlogged commits would go on under the old term until D.
    let endpoint = Endpoint::start();
    let page = endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&query("SELECT 1")).await;
    backend.message().await;
    page.write_gate(GateWord::HoldFrom { term: 4, at: now() });
    backend.send(&[complete("SELECT 1"), ready(b'I')].concat()).await;
    client.quiet().await;
    client.send(&query("SELECT 2")).await;
    backend.quiet().await;
    page.write_gate(GateWord::HoldFrom { term: 4, at: now().plus(30 * SECOND) });
    assert_eq!((client.message().await.0, client.message().await.0), (b'C', b'Z'));
    assert_eq!(backend.message().await.0, b'Q');
}

#[tokio::test]
async fn a_hold_ends_in_the_deadline_when_no_word_comes() {
    let endpoint = Endpoint::start();
    let page = endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    page.write_gate(GateWord::HoldFrom { term: 4, at: now() });
    backend.send(&text(b'A', "0000x")).await;
    client.quiet().await;
    extend(&page, 0);
    is_reset(&mut client).await;
}

#[tokio::test]
async fn another_term_or_primary_ends_every_session() {
    let elsewhere = || {
        let place = Place { host: "10.0.0.2".to_owned(), ports: EndpointPorts { read_write: 1, read_only: None } };
        routing(5, Route::To { member: name("node-b"), place })
    };
    for routing in [nobody(5), elsewhere(), routing(5, Route::Local { term: Term(5) })] {
        let endpoint = Endpoint::start();
        endpoint.leads();
        let (mut client, _backend, _) = endpoint.session().await;
        endpoint.routes.publish(routing);
        is_reset(&mut client).await;
    }
}

#[tokio::test]
async fn a_moment_of_not_knowing_ends_nobody() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    endpoint.routes.publish(nobody(4));
    client.send(&query("SELECT 1")).await;
    assert_eq!(backend.message().await.0, b'Q');
    backend.send(&[complete("SELECT 1"), ready(b'I')].concat()).await;
    assert_eq!((client.message().await.0, client.message().await.0), (b'C', b'Z'));
}

#[tokio::test]
async fn readers_of_the_standby_here_are_closed_when_it_is_none_any_more() {
    let endpoint = Endpoint::start();
    let mut standby = nobody(4);
    standby.standby_here = true;
    standby.readers = vec![Reader { member: name("node-a"), place: None, lag: Some(0), here: true }];
    endpoint.routes.publish(standby);
    let mut client = Peer::of(TcpStream::connect(("127.0.0.1", endpoint.ports[1])).await.unwrap());
    client.send(&startup(0, &[("user", "maas")])).await;
    let mut backend = endpoint.backend().await;
    backend.packet().await;
    log_in(&mut client, &mut backend).await;
    endpoint.routes.publish(nobody(4));
    is_reset(&mut client).await;
}

// === Answers that wait ===

fn cut_wait() -> Bytes {
    message(b'N', |body| body.put_slice(b"SWARNING\0C01000\0Mx\0RSyncRepWaitForLSN\0\0"))
}

#[tokio::test]
async fn an_answer_in_doubt_waits_for_a_barrier_that_began_after_it() {
    let endpoint = Endpoint::start();
    let barrier = ByHand::new();
    endpoint.barrier(Arc::new(barrier.clone()));
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&query("INSERT")).await;
    backend.message().await;
    assert_eq!(barrier.asked(), 0);
    backend.send(&[cut_wait(), complete("INSERT 0 1"), ready(b'I')].concat()).await;
    assert_eq!(client.message().await.0, b'N');
    client.quiet().await;
    assert_eq!(barrier.asked(), 1);
    barrier.returns(Ok(()));
    assert_eq!((client.message().await.0, client.message().await.0), (b'C', b'Z'));
    assert_eq!(endpoint.counters.report().doubtful, 1);
}

#[tokio::test]
async fn without_a_barrier_the_outcome_is_told_as_unknown() {
    let endpoint = Endpoint::start();
    let barrier = ByHand::new();
    endpoint.barrier(Arc::new(barrier.clone()));
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&query("CALL p()")).await;
    backend.message().await;
    backend.send(&[complete("CALL"), ready(b'I')].concat()).await;
    client.quiet().await;
    barrier.returns(Err("no standby answers"));
    let body = client.refused("08007").await;
    assert!(String::from_utf8_lossy(&body).contains("no standby answers"));
    assert_eq!(backend.message().await.0, b'X');
    assert_eq!(endpoint.counters.report().unknown, 1);
}

#[tokio::test]
async fn a_cancel_on_its_way_puts_the_answer_in_doubt() {
    // Schedule 7, where the session has switched notices off.
    let endpoint = Endpoint::start();
    let barrier = ByHand::new();
    endpoint.barrier(Arc::new(barrier.clone()));
    endpoint.leads();
    let (mut client, mut backend, key) = endpoint.session().await;
    client.send(&query("INSERT")).await;
    backend.message().await;
    let mut canceller = endpoint.client().await;
    canceller.send(&request(CANCEL, &key)).await;
    let mut passed = endpoint.backend().await;
    passed.packet().await;
    backend.send(&[complete("INSERT 0 1"), ready(b'I')].concat()).await;
    client.quiet().await;
    drop(passed);
    canceller.closed().await;
    client.quiet().await;
    barrier.returns(Ok(()));
    assert_eq!((client.message().await.0, client.message().await.0), (b'C', b'Z'));
    // The next message is nobody's victim.
    client.send(&query("INSERT")).await;
    backend.message().await;
    backend.send(&[complete("INSERT 0 1"), ready(b'I')].concat()).await;
    assert_eq!((client.message().await.0, client.message().await.0), (b'C', b'Z'));
    assert_eq!(barrier.asked(), 1);
}

#[tokio::test]
async fn an_answer_held_for_a_barrier_is_never_told_after_the_gate_was_shut() {
    let endpoint = Endpoint::start();
    let barrier = ByHand::new();
    endpoint.barrier(Arc::new(barrier.clone()));
    let page = endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&query("DO")).await;
    backend.message().await;
    backend.send(&[complete("DO"), ready(b'I')].concat()).await;
    client.quiet().await;
    page.write_gate(GateWord::Shut { term: 4 });
    barrier.returns(Ok(()));
    is_reset(&mut client).await;
}

#[tokio::test]
async fn a_session_that_ends_in_doubt_is_told_so() {
    let endpoint = Endpoint::start();
    endpoint.barrier(Arc::new(NoBarrier));
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&[text(b'P', "s"), message(b'S', |_| {})].concat()).await;
    backend.message().await;
    backend.message().await;
    backend.send(&[complete("INSERT 0 1"), cut_wait()].concat()).await;
    drop(backend);
    client.refused("08007").await;
}
