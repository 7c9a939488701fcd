//! What ordinary clients do, through the member that leads and through one that does not.

use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn clients_reach_the_primary_through_every_member() {
    let (cluster, primary) = playing(options("direct = true")).await;
    for member in 0..cluster.members.len() {
        let session = through(&cluster, member).await;
        let row = session.query_one("SELECT pg_is_in_recovery(), inet_server_port()", &[]).await.unwrap();
        assert!(!row.get::<_, bool>(0), "{member}");
        session
            .execute("INSERT INTO writes (id, client) VALUES ($1, 1)", &[&(member as i64 + 1_000_000)])
            .await
            .unwrap();
    }
    let rows = said(&psql(cluster.members[primary].endpoint_port, &["-Atc", "SELECT count(*) FROM writes"]).await);
    assert_eq!(rows, "3");
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_clients_find_nothing_missing() {
    let (cluster, primary) = playing(options("direct = true")).await;
    let standby = (primary + 1) % 3;
    for member in [primary, standby] {
        let port = cluster.members[member].endpoint_port;
        // COPY both ways: 184 MiB through 64 KB.
        let make =
            "CREATE TABLE big AS SELECT i AS id, repeat(md5(i::text), 30) AS text FROM generate_series(1, 200000) i";
        said(
            &psql(port, &["-qc", "DROP TABLE IF EXISTS big, back", "-c", make, "-c", "CREATE TABLE back (LIKE big)"])
                .await,
        );
        let file = cluster.base.join("big.copy");
        let path = file.display();
        said(&psql(port, &["-qc", &format!("\\copy big TO '{path}'")]).await);
        assert!(std::fs::metadata(&file).unwrap().len() > 180 << 20);
        said(&psql(port, &["-qc", &format!("\\copy back FROM '{path}'")]).await);
        let compare = "SELECT count(*) FROM (TABLE big EXCEPT TABLE back) x";
        assert_eq!(said(&psql(port, &["-Atc", compare]).await), "0");

        // One row of 256 MB, which nobody holds.
        let row = "SELECT repeat('x', 256 * 1024 * 1024)";
        let length = tokio::process::Command::new("sh")
            .arg("-c")
            .arg(format!("psql -X -h 127.0.0.1 -p {port} -U app -d app -Atc \"{row}\" | wc -c"))
            .env("PGPASSWORD", "app")
            .output()
            .await
            .unwrap();
        assert_eq!(said(&length), (256 * 1024 * 1024 + 1).to_string());
        let most = most_memory(&cluster, member);
        assert!(most < 100 << 10, "the endpoint grew to {most} kB");

        // LISTEN and NOTIFY.
        let heard = psql(port, &["-qc", "LISTEN c", "-c", "NOTIFY c, 'hello'", "-c", "SELECT 1"]).await;
        assert!(said(&heard).contains("Asynchronous notification \"c\" with payload \"hello\""));

        // Pipelined queries of one client, and their answers.
        let session = through(&cluster, member).await;
        let questions = (0..200_i64).map(|n| {
            let session = &session;
            async move { session.query_one("SELECT $1::bigint * 2", &[&n]).await.unwrap().get::<_, i64>(0) }
        });
        let answers = futures_util::future::join_all(questions).await;
        assert_eq!(answers, (0..200).map(|n| n * 2).collect::<Vec<i64>>());
    }
    leaves_nothing(cluster).await;
}

/// VmHWM of the member's endpoint in kB.
fn most_memory(cluster: &Cluster, member: usize) -> u64 {
    let pid = endpoint_pid(cluster, member);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn cancels_reach_their_query_through_any_member() {
    let (cluster, primary) = playing(options("direct = true")).await;
    for (own, other) in [(primary, primary), ((primary + 1) % 3, (primary + 2) % 3)] {
        let session = through(&cluster, own).await;
        let token = session.cancel_token();
        let sleeping = session.batch_execute("SELECT pg_sleep(60)");
        // The token's own address is that of `own`; the cancel is sent to `other`.
        let cancel = async {
            let query =
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(60)%' AND state = 'active'";
            while said(&psql(cluster.members[other].endpoint_port, &["-Atc", query]).await) == "0" {}
            let socket =
                tokio::net::TcpStream::connect(("127.0.0.1", cluster.members[other].endpoint_port)).await.unwrap();
            token.cancel_query_raw(socket, tokio_postgres::NoTls).await.unwrap();
        };
        let (slept, ()) = tokio::join!(sleeping, cancel);
        assert_eq!(slept.unwrap_err().code().unwrap().code(), "57014");
        session.batch_execute("SELECT 1").await.unwrap();
    }
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_takes_clients_through_the_endpoint_only() {
    // The superuser has no other way over the network then, and comes in by a rule that names it.
    let rules = "[[endpoint.allow]]\nuser = \"postgres\"\naddress = \"loopback\"\n[[endpoint.allow]]";
    let cluster = Cluster::start(options(rules)).await.unwrap();
    let primary = cluster.healthy(PATIENCE).await.unwrap();
    let member = &cluster.members[primary];
    let session = sql::connect(member.endpoint_port, &Login::superuser(), PATIENCE).await.unwrap();
    session.batch_execute("CREATE ROLE app LOGIN PASSWORD 'app'").await.unwrap();
    for login in [Login::superuser(), Login { database: "postgres".to_owned(), ..Login::app() }] {
        let direct = sql::connect(member.port, &login, PATIENCE).await;
        assert!(direct.err().unwrap().contains("pg_hba.conf rejects"), "{}", login.user);
    }
    // Nobody comes in as one of pgvigil's own roles, whose lines ask for no password.
    let own = Login { user: "pgvigil".to_owned(), ..Login::superuser() };
    assert!(sql::connect(member.endpoint_port, &own, PATIENCE).await.err().unwrap().contains("28000"));
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_are_served_by_standbys() {
    let (cluster, primary) = playing(options("direct = true")).await;
    let standby = (primary + 1) % 3;
    for member in [primary, standby] {
        let begun = std::time::Instant::now();
        let session = loop {
            // The standby may not have replayed yet that the database was made.
            match sql::connect(cluster.members[member].read_only_port, &Login::app(), PATIENCE).await {
                Ok(session) => break session,
                Err(why) => assert!(why.contains("3D000") && begun.elapsed() < PATIENCE, "{why}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(session.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get::<_, bool>(0), "{member}");
        let refused = session.execute("INSERT INTO writes (id, client) VALUES (1, 1)", &[]).await;
        assert_eq!(refused.unwrap_err().code().unwrap().code(), "25006", "PostgreSQL's own word");
    }
    leaves_nothing(cluster).await;
}

/// What a server answers to a script of raw messages, without what differs from session to session.
async fn answers(port: u16, script: &[&[u8]]) -> Vec<u8> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut startup = vec![0, 0, 0, 0, 0, 3, 0, 0];
    startup.extend(b"user\0app\0database\0app\0application_name\0differential\0\0");
    let length = (startup.len() as u32).to_be_bytes();
    startup[..4].copy_from_slice(&length);
    stream.write_all(&startup).await.unwrap();
    let mut all = Vec::new();
    let next = async |stream: &mut tokio::net::TcpStream, all: &mut Vec<u8>| -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        tokio::time::timeout(PATIENCE, stream.read_exact(&mut head)).await.expect("no answer").ok()?;
        let mut body = vec![0; u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4];
        stream.read_exact(&mut body).await.ok()?;
        // Keys are ours, process ids in notifications are PostgreSQL's.
        if head[0] == b'K' {
            body.fill(0);
        }
        if head[0] == b'A' {
            body[..4].fill(0);
        }
        // A SCRAM exchange is never the same twice.
        if head[0] != b'R' {
            all.extend(head);
            all.extend(&body);
        }
        Some((head[0], body))
    };
    let mut scram = ScramSha256::new(b"app", ChannelBinding::unsupported());
    assert_eq!(next(&mut stream, &mut all).await.unwrap().1, b"\0\0\0\x0aSCRAM-SHA-256\0\0");
    let first = [b"SCRAM-SHA-256\0", &(scram.message().len() as u32).to_be_bytes()[..], scram.message()].concat();
    stream.write_all(&tagged(b'p', &first)).await.unwrap();
    scram.update(&next(&mut stream, &mut all).await.unwrap().1[4..]).unwrap();
    stream.write_all(&tagged(b'p', scram.message())).await.unwrap();
    scram.finish(&next(&mut stream, &mut all).await.unwrap().1[4..]).unwrap();
    while next(&mut stream, &mut all).await.unwrap().0 != b'Z' {}
    for step in script {
        stream.write_all(step).await.unwrap();
    }
    stream.write_all(&tagged(b'X', b"")).await.unwrap();
    while next(&mut stream, &mut all).await.is_some() {}
    all
}

fn tagged(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_the_same_byte_for_byte() {
    let mut options = options("direct = true");
    options.members = 2;
    let (cluster, primary) = playing(options).await;
    // Once: a table made anew has another number in its row descriptions.
    let session = cluster.connect(primary, &Login::app()).await.unwrap();
    session.batch_execute("CREATE TABLE t (a int)").await.unwrap();
    let q = |sql: &str| tagged(b'Q', format!("{sql}\0").as_bytes());
    let p = |name: &str, sql: &str| tagged(b'P', format!("{name}\0{sql}\0\0\0").as_bytes());
    let b = |name: &str| tagged(b'B', [b"\0", name.as_bytes(), b"\0\0\0\0\0\0\0"].concat().as_slice());
    let (e, s, h) = (tagged(b'E', b"\0\0\0\0\0"), tagged(b'S', b""), tagged(b'H', b""));
    let d = tagged(b'D', b"P\0");
    let scripts: Vec<Vec<Vec<u8>>> = vec![
        vec![q("SELECT 1"), q(""), q("SELECT 1/0"), q("BEGIN; SELECT 1; COMMIT"), q("SELECT nothing")],
        vec![q("SELECT repeat('x', 300000), generate_series(1, 20)"), q("SELECT generate_series(1, 100000)")],
        vec![p("", "SELECT 1"), b(""), d.clone(), e.clone(), s.clone()],
        vec![p("a", "SELECT 2"), b("a"), e.clone(), h.clone(), b("a"), e.clone(), s.clone(), s.clone()],
        // An error in a batch: everything up to Sync is skipped.
        vec![p("", "SELECT 1/0"), b(""), e.clone(), p("", "SELECT 3"), b(""), e.clone(), s.clone(), q("SELECT 4")],
        vec![
            q("TRUNCATE t"),
            q("COPY t FROM STDIN"),
            tagged(b'd', b"1\n2\n"),
            s.clone(),
            h,
            tagged(b'd', b"3\n"),
            tagged(b'c', b""),
            q("COPY t TO STDOUT"),
            q("TABLE t"),
        ],
        vec![q("TRUNCATE t"), q("COPY t FROM STDIN"), tagged(b'd', b"1\n"), tagged(b'f', b"enough\0"), q("SELECT 5")],
        vec![p("", "COPY (SELECT generate_series(1, 5000)) TO STDOUT"), b(""), e.clone(), s.clone()],
        vec![
            q("LISTEN c"),
            q("NOTIFY c, 'x'"),
            q("DO $$ BEGIN RAISE NOTICE 'n'; RAISE WARNING 'w'; END $$"),
            q("SET TimeZone = 'UTC'"),
        ],
        vec![q("SELECT 1; SELECT 2; SELECT 1/0; SELECT 3"), tagged(b'F', b"\0\0\0\x01\0\0\0\0\0\0"), q("SELECT 6")],
        vec![tagged(b'?', b"")],
    ];
    for script in &scripts {
        let parts: Vec<&[u8]> = script.iter().map(Vec::as_slice).collect();
        let whole = script.concat();
        let bytes: Vec<&[u8]> = whole.chunks(7).collect();
        let direct = answers(cluster.members[primary].port, &parts).await;
        for member in 0..2 {
            let port = cluster.members[member].endpoint_port;
            for (how, steps) in [("message by message", &parts), ("in pieces", &bytes)] {
                let through = answers(port, steps).await;
                assert!(
                    direct == through,
                    "{how}: {}\n{}",
                    String::from_utf8_lossy(&direct),
                    String::from_utf8_lossy(&through)
                );
            }
        }
    }
    leaves_nothing(cluster).await;
}
