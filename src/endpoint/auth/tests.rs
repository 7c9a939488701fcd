use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf as _, Bytes};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use postgres_protocol::message::frontend;
use postgres_protocol::password::scram_sha_256;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};

use super::cache::{Patience, RoleSource};
use super::roles::RoleRecord;
use super::*;
use crate::config::access::{AccessMethod, ClientCert};
use crate::core::Moment;

const NOW: u64 = 1_000_000;

struct Fixed;

impl Clock for Fixed {
    fn now(&self) -> Moment {
        Moment { raw: 0, monotonic: 0, boottime: 0 }
    }

    fn unix_ms(&self) -> u64 {
        NOW
    }
}

struct Records(Mutex<Vec<RoleRecord>>);

#[async_trait]
impl RoleSource for Records {
    async fn fetch(&self) -> Result<Roles, String> {
        Ok(Roles::new(self.0.lock().unwrap().clone()))
    }

    fn name(&self) -> String {
        "a test".into()
    }
}

/// Thousands of rounds: once is enough.
static GEHEIM: LazyLock<String> = LazyLock::new(|| scram_sha_256(b"geheim"));

fn record(name: &str) -> RoleRecord {
    RoleRecord {
        name: name.into(),
        stored: Some(GEHEIM.clone()),
        valid_until_ms: None,
        can_login: true,
        superuser: false,
    }
}

fn roles() -> Vec<RoleRecord> {
    vec![
        record("maas"),
        RoleRecord { valid_until_ms: Some(NOW as i64 - 1), ..record("expired") },
        RoleRecord { valid_until_ms: Some(NOW as i64), ..record("young") },
        RoleRecord { can_login: false, ..record("group") },
        RoleRecord { superuser: true, ..record("postgres") },
        RoleRecord { stored: None, ..record("bare") },
    ]
}

fn gatekeeper_with(records: Vec<RoleRecord>, rules: Vec<AccessRule>) -> Gatekeeper {
    let cache = RoleCache::start(Arc::new(Records(Mutex::new(records))), Patience::default());
    Gatekeeper::new(rules, cache, MockSecret::derive(b"shared"), Arc::new(Fixed))
}

fn gatekeeper() -> Gatekeeper {
    gatekeeper_with(roles(), vec![AccessRule::default()])
}

fn visitor<'a>(user: &'a str, tls: Option<&'a TlsFacts>) -> Visitor<'a> {
    Visitor {
        user,
        database: Some("maasdb"),
        replication: false,
        address: Some(IpAddr::from([10, 0, 0, 1])),
        tls,
        tls_before: false,
    }
}

/// What a client saw and got.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    offered: Vec<String>,
    /// salt and iterations
    challenge: String,
    ok: bool,
    messages: Vec<u8>,
}

/// A client in libpq's manner, by another implementation of SCRAM.
async fn client(mut wire: DuplexStream, password: &str, binding: Option<&[u8]>) -> Seen {
    let mut seen = Seen::default();
    let mut scram = None;
    let mut buffer = BytesMut::new();
    loop {
        while buffer.len() < 5 || buffer.len() < 1 + i32::from_be_bytes(buffer[1..5].try_into().unwrap()) as usize {
            if wire.read_buf(&mut buffer).await.unwrap() == 0 {
                return seen;
            }
        }
        let length = 1 + i32::from_be_bytes(buffer[1..5].try_into().unwrap()) as usize;
        let mut message: Bytes = buffer.split_to(length).freeze();
        assert_eq!(message.get_u8(), b'R');
        message.advance(4);
        let kind = message.get_i32();
        seen.messages.push(kind as u8);
        let mut out = BytesMut::new();
        match kind {
            10 => {
                let names = message.split(|b| *b == 0).filter(|n| !n.is_empty());
                seen.offered = names.map(|n| String::from_utf8(n.to_vec()).unwrap()).collect();
                let (name, binding) = match binding {
                    Some(hash) => ("SCRAM-SHA-256-PLUS", ChannelBinding::tls_server_end_point(hash.to_vec())),
                    None => ("SCRAM-SHA-256", ChannelBinding::unsupported()),
                };
                let exchange = scram.insert(ScramSha256::new(password.as_bytes(), binding));
                frontend::sasl_initial_response(name, exchange.message(), &mut out).unwrap();
            }
            11 => {
                let text = String::from_utf8(message.to_vec()).unwrap();
                seen.challenge = text.split_once(',').unwrap().1.to_owned();
                let exchange = scram.as_mut().unwrap();
                exchange.update(&message).unwrap();
                frontend::sasl_response(exchange.message(), &mut out).unwrap();
            }
            12 => scram.as_mut().unwrap().finish(&message).unwrap(),
            0 => seen.ok = true,
            other => panic!("authentication message {other}"),
        }
        if !out.is_empty() {
            // Byte by byte: nothing may depend on how they arrive.
            for byte in out {
                wire.write_all(&[byte]).await.unwrap();
            }
        }
    }
}

async fn visit(
    keeper: &Gatekeeper,
    user: &str,
    password: &str,
    tls: Option<&TlsFacts>,
) -> (Result<Authenticated, Denied>, Seen) {
    let (mut server, wire) = duplex(64);
    let binding = tls.and_then(|tls| tls.end_point.clone());
    let asked = visitor(user, tls);
    let serve = async {
        let result = keeper.authenticate(&mut server, &asked).await;
        drop(server);
        result
    };
    tokio::join!(serve, client(wire, password, binding.as_deref()))
}

fn refusal(result: Result<Authenticated, Denied>) -> Refusal {
    match result {
        Err(Denied::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_role_with_its_password_comes_in() {
    let (result, seen) = visit(&gatekeeper(), "maas", "geheim", None).await;
    assert!(matches!(result.unwrap().credentials, Credentials::Scram(_)));
    assert_eq!((seen.offered, seen.messages, seen.ok), (vec!["SCRAM-SHA-256".to_owned()], vec![10, 11, 12, 0], true));
    let (result, _) = visit(&gatekeeper(), "young", "geheim", None).await;
    assert!(result.is_ok(), "a password is good until its moment has passed");
}

#[tokio::test]
async fn over_tls_channel_binding_is_offered_first_and_used() {
    let tls = TlsFacts { end_point: Some(Arc::from(b"hash".as_slice())), certificate: None };
    let (result, seen) = visit(&gatekeeper(), "maas", "geheim", Some(&tls)).await;
    assert_eq!(seen.offered, ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"]);
    assert!(result.is_ok());
    let unhashed = TlsFacts::default();
    let (result, seen) = visit(&gatekeeper(), "maas", "geheim", Some(&unhashed)).await;
    assert_eq!((seen.offered, result.is_ok()), (vec!["SCRAM-SHA-256".to_owned()], true));
}

/// A wrong password, no such role, an expired one, one without a password: the same words at the same point.
#[tokio::test]
async fn nobody_learns_why_a_login_failed() {
    let mut all = Vec::new();
    for (user, password) in
        [("maas", "wrong"), ("nobody", "geheim"), ("expired", "geheim"), ("bare", ""), ("pgvigil", "geheim")]
    {
        let (result, seen) = visit(&gatekeeper(), user, password, None).await;
        let refusal = refusal(result);
        assert_eq!(refusal.message, format!("password authentication failed for user \"{user}\""));
        assert!(!seen.ok);
        // Salts differ from role to role; their length does not.
        let challenge = (seen.challenge.len(), seen.challenge.rsplit_once(",i=").unwrap().1.to_owned());
        all.push((refusal.sqlstate, refusal.detail, refusal.hint, seen.messages, seen.offered, challenge));
    }
    assert!(all.iter().all(|one| *one == all[0]), "{all:#?}");
    assert_eq!(all[0].0, "28P01");
}

#[tokio::test]
async fn a_name_that_is_not_there_is_always_asked_with_the_same_salt() {
    let (_, first) = visit(&gatekeeper(), "nobody", "x", None).await;
    let (_, second) = visit(&gatekeeper(), "nobody", "y", None).await;
    assert_eq!(first.challenge, second.challenge);
}

#[tokio::test]
async fn md5_is_refused_with_a_remedy_that_tells_nothing_of_the_role() {
    let mut records = roles();
    records.push(RoleRecord { stored: Some("md53175bce1d3201d16594cebf9d7eb3f9d".into()), ..record("old") });
    let keeper = gatekeeper_with(records, vec![AccessRule::default()]);
    let hint = |result| refusal(result).hint.unwrap();
    let old = hint(visit(&keeper, "old", "geheim", None).await.0);
    assert!(old.contains("scram-sha-256"), "{old}");
    assert_eq!(old, hint(visit(&keeper, "nobody", "geheim", None).await.0));
}

#[tokio::test]
async fn a_role_that_may_not_log_in_is_told_so_after_the_proof_only() {
    let (result, seen) = visit(&gatekeeper(), "group", "geheim", None).await;
    assert!(seen.ok);
    assert_eq!(refusal(result), Refusal::new("28000", "role \"group\" is not permitted to log in"));
    let (result, _) = visit(&gatekeeper(), "group", "wrong", None).await;
    assert_eq!(refusal(result).sqlstate, "28P01");
}

#[tokio::test]
async fn superusers_come_in_by_a_rule_that_names_them() {
    let (result, _) = visit(&gatekeeper(), "postgres", "geheim", None).await;
    let refused = refusal(result);
    assert_eq!(refused.sqlstate, "28000");
    assert!(refused.hint.unwrap().contains("user = \"postgres\""));
    // Told after the proof only: else everybody could ask who is one.
    let (result, _) = visit(&gatekeeper(), "postgres", "wrong", None).await;
    assert_eq!(refusal(result).sqlstate, "28P01");
    let named = AccessRule { user: "postgres".into(), ..AccessRule::default() };
    let (result, _) = visit(&gatekeeper_with(roles(), vec![named]), "postgres", "geheim", None).await;
    assert_eq!(result.unwrap().rule, 1);
}

#[tokio::test]
async fn a_certificate_may_be_the_proof() {
    let rule = AccessRule {
        method: AccessMethod::Cert,
        client_cert: ClientCert::VerifyFull,
        tls: true,
        ..AccessRule::default()
    };
    let keeper = gatekeeper_with(roles(), vec![rule]);
    let tls = |name: &str| TlsFacts {
        end_point: None,
        certificate: Some(ClientCertificate { common_name: Some(name.into()), ..Default::default() }),
    };
    let (result, seen) = visit(&keeper, "maas", "", Some(&tls("maas"))).await;
    assert!(matches!(result.unwrap().credentials, Credentials::Certificate));
    assert_eq!(seen.messages, [0]);
    assert_eq!(refusal(visit(&keeper, "maas", "", Some(&tls("eve"))).await.0).sqlstate, "28000");
    let ghost = refusal(visit(&keeper, "ghost", "", Some(&tls("ghost"))).await.0);
    assert_eq!(ghost.message, "role \"ghost\" does not exist");
}

#[tokio::test]
async fn what_comes_after_the_proof_is_left_where_it_is() {
    let keeper = gatekeeper();
    let (mut server, wire) = duplex(4096);
    let asked = visitor("maas", None);
    let (mut read, mut write) = tokio::io::split(wire);
    let talk = async {
        let mut scram = ScramSha256::new(b"geheim", ChannelBinding::unsupported());
        let mut out = BytesMut::new();
        frontend::sasl_initial_response("SCRAM-SHA-256", scram.message(), &mut out).unwrap();
        write.write_all(&out.split()).await.unwrap();
        let mut frame = async |skip: usize| {
            let _ = read.read_exact(&mut vec![0; skip]).await.unwrap();
            assert_eq!(read.read_u8().await.unwrap(), b'R');
            let mut body = vec![0; read.read_i32().await.unwrap() as usize - 4];
            read.read_exact(&mut body).await.unwrap();
            body
        };
        frame(0).await;
        let challenge = frame(0).await;
        scram.update(&challenge[4..]).unwrap();
        frontend::sasl_response(scram.message(), &mut out).unwrap();
        // A client that does not wait: its first query in the same packet.
        out.extend_from_slice(b"Q\0\0\0\x0dselect 1\0");
        write.write_all(&out).await.unwrap();
        read
    };
    let (result, _read) = tokio::join!(keeper.authenticate(&mut server, &asked), talk);
    result.unwrap();
    let mut rest = [0; 14];
    server.read_exact(&mut rest).await.unwrap();
    assert_eq!(&rest, b"Q\0\0\0\x0dselect 1\0");
}

#[tokio::test]
async fn a_client_that_hangs_up_is_nobodys_error() {
    for close_after in [0, 1] {
        let (mut server, wire) = duplex(4096);
        let hang_up = async {
            let (mut read, mut write) = tokio::io::split(wire);
            if close_after == 1 {
                let _ = read.read_u8().await.unwrap();
                write.write_all(b"p\0").await.unwrap();
            }
        };
        let keeper = gatekeeper();
        let asked = visitor("maas", None);
        let (result, ()) = tokio::join!(keeper.authenticate(&mut server, &asked), hang_up);
        assert!(matches!(result, Err(Denied::Gone(_))), "{result:?}");
    }
}

async fn says(bytes: &[u8]) -> Result<Authenticated, Denied> {
    let (mut server, mut wire) = duplex(4096);
    wire.write_all(bytes).await.unwrap();
    wire.shutdown().await.unwrap();
    gatekeeper().authenticate(&mut server, &visitor("maas", None)).await
}

#[tokio::test]
async fn messages_that_are_none_are_refused_as_postgresql_does() {
    let code = async |bytes: &[u8]| refusal(says(bytes).await).sqlstate;
    assert_eq!(code(b"Q\0\0\0\x0dselect 1\0").await, "08P01");
    assert_eq!(code(b"p\0\0\0\x03").await, "08P01");
    assert_eq!(code(b"p\xff\xff\xff\xff").await, "08P01");
    assert_eq!(code(b"p\0\0\x04\x05").await, "08P01", "more than 1024 bytes are not waited for");
    assert_eq!(code(b"p\0\0\0\x08SCRA").await, "08P01");
    assert_eq!(code(b"p\0\0\0\x0cSCRAM-X\0").await, "08P01");
    // -PLUS was not offered: no TLS.
    assert_eq!(code(b"p\0\0\0\x1bSCRAM-SHA-256-PLUS\0\0\0\0\0").await, "08P01");
    let user = visitor("", None);
    let (mut server, _wire) = duplex(64);
    assert_eq!(refusal(gatekeeper().authenticate(&mut server, &user).await).sqlstate, "28000");
}

#[tokio::test]
async fn a_client_may_wait_for_an_empty_challenge() {
    let (mut server, wire) = duplex(4096);
    let (mut read, mut write) = tokio::io::split(wire);
    let talk = async {
        write.write_all(b"p\0\0\0\x16SCRAM-SHA-256\0\xff\xff\xff\xff").await.unwrap();
        let mut offer = [0; 24];
        read.read_exact(&mut offer).await.unwrap();
        let mut empty = [0; 9];
        read.read_exact(&mut empty).await.unwrap();
        assert_eq!(&empty, b"R\0\0\0\x08\0\0\0\x0b");
        write.write_all(b"p\0\0\0\x0fn,,n=,r=abc").await.unwrap();
        assert_eq!(read.read_u8().await.unwrap(), b'R');
    };
    let keeper = gatekeeper();
    let asked = visitor("maas", None);
    tokio::select! {
        result = keeper.authenticate(&mut server, &asked) => panic!("{result:?}"),
        () = talk => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_client_sends_it_is_not_let_in(bytes in prop::collection::vec(any::<u8>(), 0..300), framed: bool) {
        let mut message = Vec::new();
        if framed {
            message.push(b'p');
            message.extend(i32::try_from(bytes.len() + 4).unwrap().to_be_bytes());
        }
        message.extend(&bytes);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(5), says(&message)).await.expect("an end")
        });
        prop_assert!(result.is_err());
    }

    /// A backend that says anything does not make us believe that we are in, nor panic.
    #[test]
    fn whatever_a_backend_sends_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 1i32..14) {
        let keys = scram::Keys {
            client_key: verifier::Key::new([1; 32]),
            server_key: verifier::Key::new([2; 32]),
            salt: vec![1],
            iterations: 4096,
        };
        let mut message = vec![b'R'];
        message.extend(i32::try_from(bytes.len() + 8).unwrap().to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend(&bytes);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(async {
            let (mut ours, mut theirs) = duplex(4096);
            theirs.write_all(&message).await.unwrap();
            theirs.shutdown().await.unwrap();
            login::log_in(&mut ours, &Credentials::Scram(keys)).await
        });
        prop_assert!(result.is_err());
    }
}

// === to the backend ===

/// Our own server side as the backend, with `stored` as its verifier.
async fn backend_login(keeper: &Gatekeeper, backend: &Gatekeeper, user: &str) -> Result<(), login::BackendError> {
    let credentials = visit(keeper, user, "geheim", None).await.0.unwrap().credentials;
    let (mut near, mut far) = duplex(4096);
    let asked = visitor(user, None);
    let serve = async {
        if let Err(Denied::Refused(refusal)) = backend.authenticate(&mut far, &asked).await {
            let body = format!("SFATAL\0C{}\0M{}\0\0", refusal.sqlstate, refusal.message);
            let mut message = vec![b'E'];
            message.extend(i32::try_from(body.len() + 4).unwrap().to_be_bytes());
            message.extend(body.as_bytes());
            far.write_all(&message).await.unwrap();
        }
    };
    let connect = async {
        let result = login::log_in(&mut near, &credentials).await;
        drop(near);
        result
    };
    tokio::join!(connect, serve).0
}

#[tokio::test]
async fn the_client_is_logged_in_to_a_backend_with_the_same_verifier() {
    let records = roles();
    let keeper = gatekeeper_with(records.clone(), vec![AccessRule::default()]);
    let backend = gatekeeper_with(records, vec![AccessRule::default()]);
    backend_login(&keeper, &backend, "maas").await.unwrap();
}

#[tokio::test]
async fn a_backend_with_another_verifier_is_told_from_a_wrong_password() {
    let changed = RoleRecord { stored: Some(scram_sha_256(b"geheim")), ..record("maas") };
    let backend = gatekeeper_with(vec![changed], vec![AccessRule::default()]);
    let error = backend_login(&gatekeeper(), &backend, "maas").await.unwrap_err();
    assert!(matches!(error, login::BackendError::Scram(scram::LoginError::OtherVerifier)), "{error}");
}

#[tokio::test]
async fn a_backends_refusal_comes_back_in_its_own_words() {
    let records = roles();
    let keeper = gatekeeper_with(records.clone(), vec![AccessRule::default()]);
    let backend = gatekeeper_with(records, vec![AccessRule { method: AccessMethod::Reject, ..AccessRule::default() }]);
    let error = backend_login(&keeper, &backend, "maas").await.unwrap_err();
    assert!(matches!(&error, login::BackendError::Refused { code, .. } if code == "28000"), "{error}");
}

#[tokio::test]
async fn a_backend_that_trusts_everybody_is_not_used() {
    let credentials = visit(&gatekeeper(), "maas", "geheim", None).await.0.unwrap().credentials;
    let ok = b"R\0\0\0\x08\0\0\0\0".as_slice();
    let mut wire = tokio::io::join(ok, tokio::io::sink());
    let error = login::log_in(&mut wire, &credentials).await.unwrap_err();
    assert!(matches!(&error, login::BackendError::Method(why) if why.contains("pg_hba.conf")), "{error}");
    let mut wire = tokio::io::join(ok, tokio::io::sink());
    login::log_in(&mut wire, &Credentials::Certificate).await.unwrap();
    for method in [3, 5] {
        let ask = [b"R\0\0\0\x0c\0\0\0".as_slice(), &[method], b"salt"].concat();
        let mut wire = tokio::io::join(ask.as_slice(), tokio::io::sink());
        let error = login::log_in(&mut wire, &credentials).await.unwrap_err();
        assert!(error.to_string().contains("password_encryption"), "{error}");
    }
}
