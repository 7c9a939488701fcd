//! Bytes both ways: everything, in order, whatever the pieces; and who ends when the other side does.

use super::*;

/// Anything that a server may send in one session, with large and empty bodies.
fn answers(count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in 0..count {
        bytes.extend(text(b'T', "columns"));
        bytes.extend(message(b'D', |body| body.put_bytes(number as u8, (number * 7919) % 70_000)));
        bytes.extend(text(b'A', "channel"));
        bytes.extend(text(b'N', "SNOTICE"));
        bytes.extend(complete("SELECT 1"));
        bytes.extend(text(b'S', "TimeZone\0UTC"));
        bytes.extend(ready(b'I'));
    }
    bytes
}

#[tokio::test]
async fn everything_passes_in_order_whatever_the_pieces() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (client, backend, _) = endpoint.session().await;
    let down = answers(60);
    let up: Vec<u8> = (0..500).flat_map(|n| query(&"x".repeat((n * 31) % 3000))).collect();
    let (mut from_client, mut to_client) = client.stream.into_split();
    let (mut from_backend, mut to_backend) = backend.stream.into_split();
    let pieces = async |writer: &mut (dyn tokio::io::AsyncWrite + Unpin + Send), bytes: &[u8], sizes: [usize; 5]| {
        let mut rest = bytes;
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at((*size).min(rest.len()));
            writer.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
            rest = after;
        }
    };
    let (mut seen_down, mut seen_up) = (vec![0; down.len()], vec![0; up.len()]);
    let exchange = async {
        tokio::join!(
            pieces(&mut to_backend, &down, [1, 3, 5, 70_000, 1000]),
            pieces(&mut to_client, &up, [2, 1, 9000, 4, 77]),
            async { from_client.read_exact(&mut seen_down).await.unwrap() },
            async { from_backend.read_exact(&mut seen_up).await.unwrap() },
        )
    };
    timeout(PATIENCE, exchange).await.expect("stuck");
    assert!(seen_down == down && seen_up == up);
}

#[tokio::test]
async fn who_does_not_read_stops_who_writes() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (client, mut backend, _) = endpoint.session().await;
    // A row of a gigabyte is begun, and the client takes nothing of it.
    backend.send(&[b'D', 0x3f, 0xff, 0xff, 0xff]).await;
    let chunk = vec![7; 1 << 20];
    let mut written = 0_u64;
    while let Ok(write) = timeout(Duration::from_millis(300), backend.stream.write(&chunk)).await {
        written += write.unwrap() as u64;
        assert!(written < 64 << 20, "somebody keeps it");
    }
    // Now it reads, and it goes on.
    let reading = tokio::spawn(async move {
        let mut client = client;
        let mut sink = vec![0; 1 << 20];
        while client.stream.read(&mut sink).await.is_ok_and(|count| count > 0) {}
    });
    backend.send(&chunk).await;
    reading.abort();
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_backend_along() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    // Between two messages: in order.
    let (client, mut backend, _) = endpoint.session().await;
    drop(client);
    assert_eq!(backend.message().await.0, b'X');
    backend.closed().await;
    // In the middle of one: no message of ours may end up inside it.
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&[b'd', 0, 0, 1, 0, 1, 2, 3]).await;
    backend.read(8).await;
    drop(client);
    backend.closed().await;
}

#[tokio::test]
async fn half_a_close_is_a_whole_one() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.stream.shutdown().await.unwrap();
    assert_eq!(backend.message().await.0, b'X');
    client.closed().await;
}

#[tokio::test]
async fn what_runs_for_nobody_is_cancelled() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&query("SELECT pg_sleep(1000)")).await;
    backend.message().await;
    drop(client);
    let mut cancel = endpoint.backend().await;
    assert_eq!(cancel.packet().await[4..], BACKEND_KEY);
    drop(cancel);
    assert_eq!(backend.message().await.0, b'X');
}

#[tokio::test]
async fn who_says_goodbye_is_not_cancelled() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&[query("INSERT"), message(b'X', |_| {})].concat()).await;
    drop(client);
    assert_eq!((backend.message().await.0, backend.message().await.0), (b'Q', b'X'));
    assert!(timeout(QUIET, endpoint.fake.accept()).await.is_err(), "it was told, and may finish");
}

#[tokio::test]
async fn the_last_words_of_a_backend_arrive() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    backend.send(&error("57P01")).await;
    drop(backend);
    client.refused("57P01").await;
}

#[tokio::test]
async fn what_is_not_the_protocol_ends_the_session() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&[b'Q', 0, 0, 0, 1]).await;
    client.refused("08P01").await;
    backend.closed().await;
}

#[tokio::test]
async fn sessions_that_name_the_setting_are_counted_while_they_live() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    let (mut client, mut backend, _) = endpoint.session().await;
    client.send(&query("SET Synchronous_Commit = off")).await;
    backend.message().await;
    assert_eq!(endpoint.counters.report().setting_named, 1);
    backend.send(&[complete("SET"), ready(b'I')].concat()).await;
    client.message().await;
    client.message().await;
    drop((client, backend));
    let begun = std::time::Instant::now();
    while endpoint.counters.report().setting_named > 0 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn connections_that_come_and_go_leave_nothing() {
    let endpoint = Endpoint::start();
    endpoint.leads();
    for round in 0..30 {
        let (client, backend, _) = endpoint.session().await;
        // By reset, by close, and from the other side.
        if round % 3 == 0 {
            client.stream.set_zero_linger().unwrap();
        }
        if round % 3 == 2 {
            drop(backend);
        }
        drop(client);
    }
    let begun = std::time::Instant::now();
    while endpoint.counters.report().connections > 0 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let report = endpoint.counters.report();
    assert_eq!((report.sessions, report.waiting, report.accepted), (0, 0, 30));
}
