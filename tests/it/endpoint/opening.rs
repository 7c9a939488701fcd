//! From the first byte to ReadyForQuery.

use pgvigil::endpoint::wire::message::read_negotiate;
use pgvigil::endpoint::wire::proxy::{Header, Port};

use super::*;

#[tokio::test]
async fn encryption_is_declined_and_the_session_goes_on() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let mut client = endpoint.client().await;
    client.send(&request(SSL, b"")).await;
    assert_eq!(client.read(1).await, b"N");
    client.send(&request(GSSENC, b"")).await;
    assert_eq!(client.read(1).await, b"N");
    let sent = startup(0, &[("user", "maas"), ("application_name", "maas-regiond-x"), ("options", "-c a.b=1")]);
    client.send(&sent).await;
    let mut backend = endpoint.backend().await;
    assert_eq!(packet(&backend.packet().await), sent, "word for word");
    log_in(&mut client, &mut backend).await;
    assert_eq!(endpoint.ledger.0.lock().unwrap()[0].application_name, "maas-regiond-x");
}

#[tokio::test]
async fn requests_come_once_and_alone() {
    let endpoint = Endpoint::start();
    for code in [SSL, GSSENC] {
        let mut client = endpoint.client().await;
        client.send(&request(code, b"")).await;
        client.read(1).await;
        client.send(&request(code, b"")).await;
        client.refused("08P01").await;

        // What is sent along must not count as sent after the answer.
        let mut client = endpoint.client().await;
        client.send(&[request(code, b""), startup(0, &[("user", "maas")])].concat()).await;
        client.refused("08P01").await;
    }
}

#[tokio::test]
async fn a_startup_packet_byte_by_byte_is_a_startup_packet() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let mut client = endpoint.client().await;
    client.stream.set_nodelay(true).unwrap();
    for byte in startup(0, &[("user", "maas")]) {
        client.send(&[byte]).await;
    }
    let mut backend = endpoint.backend().await;
    assert!(backend.packet().await.ends_with(b"maas\0\0"));
}

#[tokio::test]
async fn what_is_no_startup_packet_is_refused() {
    let endpoint = Endpoint::start();
    for (bytes, code) in [
        (10_001_u32.to_be_bytes().to_vec(), "08P01"),
        (7_u32.to_be_bytes().to_vec(), "08P01"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "08P01"),
        (packet(&(2_u32 << 16).to_be_bytes()), "0A000"),
        (startup(0, &[]), "28000"),
        (request(CANCEL, b"1234"), "08P01"),
    ] {
        let mut client = endpoint.client().await;
        client.send(&bytes).await;
        client.refused(code).await;
    }
    assert_eq!(endpoint.counters.report().refused, 6);
}

#[tokio::test]
async fn a_client_that_says_nothing_is_closed() {
    let endpoint = Endpoint::with(|settings| settings.startup_timeout = Duration::from_millis(50));
    for bytes in [&b""[..], b"\0\0"] {
        let mut client = endpoint.client().await;
        client.send(bytes).await;
        client.closed().await;
    }
}

#[tokio::test]
async fn pgvigils_own_roles_and_replication_do_not_come_in() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    for (parameters, code) in [
        (vec![("user", "pgvigil")], "28000"),
        (vec![("user", "maas"), ("replication", "true")], "0A000"),
        (vec![("user", "maas"), ("replication", "database")], "0A000"),
    ] {
        let mut client = endpoint.client().await;
        client.send(&startup(0, &parameters)).await;
        client.refused(code).await;
    }
}

#[tokio::test]
async fn a_backend_that_asks_for_no_proof_lets_nobody_in() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let mut client = endpoint.client().await;
    client.send(&startup(0, &[("user", "maas")])).await;
    let mut backend = endpoint.backend().await;
    backend.packet().await;
    backend.send(&authentication(0, b"")).await;
    client.refused("28000").await;
    backend.closed().await;
}

#[tokio::test]
async fn notices_wait_until_libpq_takes_them() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let mut client = endpoint.client().await;
    client.send(&startup(0, &[("user", "maas")])).await;
    let mut backend = endpoint.backend().await;
    backend.packet().await;
    backend.send(&text(b'N', "SNOTICE")).await;
    backend.send(&authentication(3, b"")).await;
    assert_eq!(client.message().await.0, b'R');
    client.send(&text(b'p', "secret")).await;
    backend.message().await;
    backend.send(&authentication(0, b"")).await;
    assert_eq!((client.message().await.0, client.message().await.0), (b'R', b'N'));
}

#[tokio::test]
async fn versions_and_options_are_negotiated_once_for_the_least_of_all() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let mut client = endpoint.client().await;
    client.send(&startup(9999, &[("user", "maas"), ("_pq_.test_protocol_negotiation", "")])).await;
    let mut backend = endpoint.backend().await;
    let seen = backend.packet().await;
    assert_eq!(seen[..4], (3_u32 << 16 | 2).to_be_bytes());
    assert!(!String::from_utf8_lossy(&seen).contains("_pq_"));
    // PostgreSQL 15 knows 3.0 alone, and says so.
    backend.send(&message(b'v', |body| body.put_slice(&[0, 3, 0, 0, 0, 0, 0, 0]))).await;
    backend.send(&authentication(3, b"")).await;
    let (tag, body) = client.message().await;
    assert_eq!(tag, b'v');
    assert_eq!(read_negotiate(&body), Some((0, vec![Bytes::from_static(b"_pq_.test_protocol_negotiation")])));
    assert_eq!(client.message().await.0, b'R');
}

#[tokio::test]
async fn keys_are_ours_and_reach_the_backend_while_something_runs() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (mut client, mut backend, key) = endpoint.session().await;
    assert_ne!(key[..], BACKEND_KEY);
    assert_eq!((key.len(), key[0] & 0x80), (8, 0));

    let cancel = async |key: &[u8]| {
        let mut canceller = endpoint.client().await;
        canceller.send(&request(CANCEL, key)).await;
        canceller
    };
    // Nothing runs: PostgreSQL is not bothered, and what comes next is not hit.
    cancel(&key).await.closed().await;
    client.send(&query("SELECT pg_sleep(9)")).await;
    backend.message().await;
    cancel(b"notakey!").await.closed().await;
    let mut canceller = cancel(&key).await;
    let mut passed = endpoint.backend().await;
    assert_eq!(passed.packet().await[4..], BACKEND_KEY);
    canceller.quiet().await;
    drop(passed);
    canceller.closed().await;
    assert_eq!(endpoint.counters.report().cancels, 3);
}

#[tokio::test]
async fn the_key_ends_with_its_session() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (client, mut backend, key) = endpoint.session().await;
    drop(client);
    assert_eq!(backend.message().await.0, b'X');
    backend.closed().await;
    let mut canceller = endpoint.client().await;
    canceller.send(&request(CANCEL, &key)).await;
    canceller.closed().await;
    assert!(timeout(QUIET, endpoint.fake.accept()).await.is_err());
}

#[tokio::test]
async fn a_proxy_header_is_believed_from_those_who_may_speak_for_others() {
    let header = Header {
        client: Some("10.9.8.7:1".parse().unwrap()),
        port: Some(Port::ReadWrite),
        via: Some("region-a".to_owned()),
        identity: Some("maas-regiond-7".to_owned()),
    };
    let told = async |proxies: Vec<Network>| {
        let endpoint = Endpoint::with(|settings| settings.proxies = proxies);
        endpoint.leads();
        let mut client = endpoint.client().await;
        client.send(&[header.to_bytes(), startup(0, &[("user", "maas")])].concat()).await;
        endpoint.backend().await.packet().await;
        endpoint.ledger.0.lock().unwrap()[0].clone()
    };
    let believed = told(vec![Network { address: [127, 0, 0, 0].into(), prefix: 8 }]).await;
    assert_eq!(believed.address, Some([10, 9, 8, 7].into()));
    assert_eq!((believed.via.as_deref(), believed.certificate.as_deref()), (Some("region-a"), Some("maas-regiond-7")));
    let stranger = told(Vec::new()).await;
    assert_eq!((stranger.address, stranger.via, stranger.certificate), (Some([127, 0, 0, 1].into()), None, None));
}

#[tokio::test]
async fn a_broken_proxy_header_is_refused() {
    let endpoint = Endpoint::start();
    let mut client = endpoint.client().await;
    let mut header = Header::default().to_bytes();
    header[12] = 0x11;
    client.send(&header).await;
    client.refused("08P01").await;
}

#[tokio::test]
async fn connections_wait_for_a_primary() {
    let endpoint = Endpoint::start();
    endpoint.routes.publish(nobody(3));
    let mut client = endpoint.client().await;
    client.send(&startup(0, &[("user", "maas")])).await;
    client.quiet().await;
    assert_eq!(endpoint.counters.report().waiting, 1);
    endpoint.leads();
    let mut backend = endpoint.backend().await;
    backend.packet().await;
    log_in(&mut client, &mut backend).await;
}

#[tokio::test]
async fn they_do_not_wait_for_ever_and_hear_why() {
    let endpoint = Endpoint::with(|settings| settings.failover_hold = Duration::from_millis(20));
    for routing in [None, Some(nobody(3)), Some(Routing { valid_until: moment(), ..nobody(3) })] {
        if let Some(routing) = routing {
            endpoint.routes.publish(routing);
        }
        let mut client = endpoint.client().await;
        client.send(&startup(0, &[("user", "maas")])).await;
        let body = client.refused("57P03").await;
        assert!(String::from_utf8_lossy(&body).contains("cannot connect now"));
    }
}

#[tokio::test]
async fn who_leaves_while_waiting_waits_no_more() {
    let endpoint = Endpoint::start();
    endpoint.routes.publish(nobody(3));
    let mut client = endpoint.client().await;
    client.send(&startup(0, &[("user", "maas")])).await;
    client.quiet().await;
    drop(client);
    let begun = std::time::Instant::now();
    while endpoint.counters.report().waiting > 0 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_postgresql_that_is_starting_is_asked_again() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let mut client = endpoint.client().await;
    client.send(&startup(0, &[("user", "maas")])).await;
    for _ in 0..2 {
        let mut backend = endpoint.backend().await;
        backend.packet().await;
        backend.send(&error("57P03")).await;
    }
    let mut backend = endpoint.backend().await;
    backend.packet().await;
    log_in(&mut client, &mut backend).await;
}

#[tokio::test]
async fn what_postgresql_refuses_is_passed_on() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let mut client = endpoint.client().await;
    client.send(&startup(0, &[("user", "maas")])).await;
    let mut backend = endpoint.backend().await;
    backend.packet().await;
    backend.send(&error("28P01")).await;
    client.refused("28P01").await;
}

#[tokio::test]
async fn a_front_is_told_that_the_primary_is_elsewhere() {
    let endpoint = Endpoint::start();
    let place = Place { host: "127.0.0.1".to_owned(), ports: EndpointPorts { read_write: 1, read_only: None } };
    endpoint.routes.publish(routing(4, Route::To { member: name("node-b"), place }));
    let mut front = endpoint.client().await;
    let header = Header { port: Some(Port::ReadWrite), ..Header::default() };
    front.send(&[header.to_bytes(), startup(0, &[("user", "maas")])].concat()).await;
    // No second hop, and no wait: the front knows better where to ask next.
    front.refused("57P03").await;
}

#[tokio::test]
async fn readers_go_to_the_standby_that_is_near_enough() {
    let endpoint = Endpoint::start();
    let reader = |lag| Reader { member: name("node-a"), place: None, lag, here: true };
    let reads = async |lag: Option<u64>, found: bool| {
        let mut standby = nobody(4);
        standby.standby_here = true;
        standby.readers = vec![reader(lag)];
        endpoint.routes.publish(standby);
        let mut client = Peer::of(TcpStream::connect(("127.0.0.1", endpoint.ports[1])).await.unwrap());
        client.send(&startup(0, &[("user", "maas")])).await;
        assert_eq!(timeout(QUIET, endpoint.fake.accept()).await.is_ok(), found, "{lag:?}");
    };
    reads(Some(1_001), false).await;
    reads(None, false).await;
    reads(Some(1_000), true).await;
}

#[tokio::test]
async fn sessions_go_through_the_front_of_another_host() {
    let gate = Endpoint::start();
    let barrier = ByHand::new();
    barrier.returns(Ok(()));
    gate.barrier(Arc::new(barrier));
    gate.leads();
    let front = Endpoint::with(|settings| {
        settings.member = Some(name("node-b"));
        settings.name = "node-b".to_owned();
    });
    let ports = EndpointPorts { read_write: gate.ports[0], read_only: None };
    let place = Place { host: "127.0.0.1".to_owned(), ports };
    let mut there = routing(4, Route::To { member: name("node-a"), place: place.clone() });
    there.members.insert(name("node-a"), Some(place));
    front.routes.publish(there);
    let mut client = front.client().await;
    client.send(&startup(0, &[("user", "maas")])).await;
    let mut backend = gate.backend().await;
    backend.packet().await;
    let key = log_in(&mut client, &mut backend).await;
    client.send(&query("SELECT 1")).await;
    assert_eq!(backend.message().await.0, b'Q');
    // Any front passes a cancel on to the member that gave out the key.
    let mut canceller = front.client().await;
    canceller.send(&request(CANCEL, &key)).await;
    let mut passed = gate.backend().await;
    assert_eq!(passed.packet().await[4..], BACKEND_KEY);
    drop(passed);
    canceller.closed().await;
    backend.send(&[complete("SELECT 1"), ready(b'I')].concat()).await;
    assert_eq!((client.message().await.0, client.message().await.0), (b'C', b'Z'));
    assert!(front.ledger.0.lock().unwrap().is_empty(), "counted at the gate alone");
    assert_eq!(gate.ledger.0.lock().unwrap().len(), 1);
}
