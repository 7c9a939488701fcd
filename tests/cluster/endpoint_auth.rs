//! The endpoint's authentication between real clients and a real PostgreSQL: psql (libpq) and tokio-postgres come to a small
//! acceptor that does what the front and the gate do, and nothing else.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use pgvigil::config::access::{AccessMethod, AccessRule, ClientCert};
use pgvigil::config::{EndpointTls, Secret};
use pgvigil::endpoint::auth::cache::{Patience, RoleCache, RoleSource};
use pgvigil::endpoint::auth::login::{self, BackendError};
use pgvigil::endpoint::auth::source::LocalRoles;
use pgvigil::endpoint::auth::verifier::MockSecret;
use pgvigil::endpoint::auth::{Denied, Gatekeeper, Refusal, TlsFacts, Visitor};
use pgvigil::endpoint::tls::{ServerTls, Way};
use pgvigil::fencing::SystemClock;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio_postgres::NoTls;

use crate::postgres_adapter::harness::{Cluster, Member, skipped};

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;

trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

struct Acceptor {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct House {
    gatekeeper: Gatekeeper,
    tls: Option<ServerTls>,
    backend: PathBuf,
}

impl Acceptor {
    async fn start(member: &Member, rules: Vec<AccessRule>, tls: Option<ServerTls>) -> Acceptor {
        let postgresql = &member.config.postgresql;
        let source = local_roles(member, postgresql.internal_password.clone());
        let roles = RoleCache::start(Arc::new(source), Patience::default());
        let gatekeeper = Gatekeeper::new(rules, roles, MockSecret::derive(b"shared"), Arc::new(SystemClock));
        let backend = postgresql.socket_dir.join(format!(".s.PGSQL.{}", postgresql.port));
        let house = Arc::new(House { gatekeeper, tls, backend });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            loop {
                let (socket, peer) = listener.accept().await.unwrap();
                let house = house.clone();
                // Ends with its client.
                tokio::spawn(async move { drop(house.serve(socket, peer).await) });
            }
        });
        Acceptor { address, task }
    }
}

impl House {
    async fn serve(&self, socket: TcpStream, peer: SocketAddr) -> io::Result<()> {
        let mut first = [0];
        socket.peek(&mut first).await?;
        let mut tls: Option<TlsFacts> = None;
        let mut wire: Box<dyn Wire> = Box::new(socket);
        if first[0] == 0x16 {
            let (stream, facts) = self.tls.as_ref().unwrap().accept(wire, Way::Direct).await?;
            (wire, tls) = (Box::new(stream), Some(facts));
        }
        let startup = loop {
            let packet = packet(&mut wire).await?;
            match u32::from_be_bytes(packet[4..8].try_into().unwrap()) {
                GSSENC_REQUEST => wire.write_all(b"N").await?,
                SSL_REQUEST if self.tls.is_none() || tls.is_some() => wire.write_all(b"N").await?,
                SSL_REQUEST => {
                    wire.write_all(b"S").await?;
                    let (stream, facts) = self.tls.as_ref().unwrap().accept(wire, Way::Asked).await?;
                    (wire, tls) = (Box::new(stream), Some(facts));
                }
                _ => break packet,
            }
        };
        let words: Vec<&str> = startup[8..].split(|b| *b == 0).map(|w| std::str::from_utf8(w).unwrap()).collect();
        let get = |name: &str| words.chunks(2).find(|pair| pair[0] == name).and_then(|pair| pair.get(1).copied());
        let visitor = Visitor {
            user: get("user").unwrap_or_default(),
            database: get("database"),
            replication: false,
            address: Some(peer.ip()),
            tls: tls.as_ref(),
            tls_before: false,
        };
        let authenticated = match self.gatekeeper.authenticate(&mut wire, &visitor).await {
            Ok(authenticated) => authenticated,
            Err(Denied::Gone(error)) => return Err(error),
            Err(Denied::Refused(refusal)) => return refuse(&mut wire, &fields(&refusal)).await,
        };
        let mut backend = UnixStream::connect(&self.backend).await?;
        backend.write_all(&startup).await?;
        match login::log_in(&mut backend, &authenticated.credentials).await {
            Ok(()) => drop(copy_bidirectional(&mut wire, &mut backend).await),
            Err(BackendError::Refused { body, .. }) => refuse(&mut wire, &body).await?,
            Err(error) => refuse(&mut wire, &fields(&Refusal::new("08006", error.to_string()))).await?,
        }
        Ok(())
    }
}

async fn packet(wire: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = wire.read_u32().await?;
    let mut packet = vec![0; length as usize];
    packet[..4].copy_from_slice(&length.to_be_bytes());
    wire.read_exact(&mut packet[4..]).await?;
    Ok(packet)
}

fn fields(refusal: &Refusal) -> Vec<u8> {
    let mut body = format!("SFATAL\0VFATAL\0C{}\0M{}\0", refusal.sqlstate, refusal.message);
    for (name, text) in [('D', &refusal.detail), ('H', &refusal.hint)] {
        if let Some(text) = text {
            body.push_str(&format!("{name}{text}\0"));
        }
    }
    body.push('\0');
    body.into_bytes()
}

async fn refuse(wire: &mut (impl AsyncWrite + Unpin), body: &[u8]) -> io::Result<()> {
    let mut message = BytesMut::new();
    message.put_u8(b'E');
    message.put_u32(body.len() as u32 + 4);
    message.put_slice(body);
    wire.write_all(&message).await?;
    wire.shutdown().await
}

fn local_roles(member: &Member, password: Secret) -> LocalRoles {
    LocalRoles::new(member.config.postgresql.socket_dir.clone(), member.config.postgresql.port, password)
}

/// Certificate and key for the acceptor and for clients, all of one authority.
struct Certificates {
    directory: tempfile::TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Certificates {
    fn new() -> Certificates {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "a test's authority");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), authority.pem()).unwrap();
        Certificates { directory, authority }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn issue(&self, common_name: &str) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        let (cert_file, key_file) =
            (self.path(&format!("{common_name}.pem")), self.path(&format!("{common_name}.key")));
        std::fs::write(&cert_file, certificate.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&key_file, std::fs::Permissions::from_mode(0o600)).unwrap();
        (cert_file, key_file)
    }

    fn server(&self) -> ServerTls {
        let (cert_file, key_file) = self.issue("endpoint");
        let client_ca_file = Some(self.path("ca.pem"));
        ServerTls::read(&EndpointTls { cert_file, key_file, client_ca_file, tls_1_3_only: false }).unwrap()
    }
}

/// psql without anybody's settings: a thread of its own, the acceptor needs this one.
async fn psql(address: SocketAddr, settings: &str, password: &str, sql: &str) -> Output {
    let mut command = Command::new("psql");
    command.env_clear().env("PATH", std::env::var("PATH").unwrap()).env("PGCONNECT_TIMEOUT", "10");
    command.env("PGPASSWORD", password).env("HOME", "/nonexistent");
    let (host, port) = (address.ip(), address.port());
    command.args(["-XAtw", "-d", &format!("host={host} port={port} gssencmode=prefer {settings}"), "-c", sql]);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn says(address: SocketAddr, settings: &str, password: &str, sql: &str) -> String {
    let output = psql(address, settings, password, sql).await;
    assert!(output.status.success(), "{settings}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The sentence behind `FATAL:`; it must not have worked.
async fn fatal(address: SocketAddr, settings: &str, password: &str) -> String {
    let output = psql(address, settings, password, "select 1").await;
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{settings} worked");
    error.split_once("FATAL:  ").map(|(_, rest)| rest.trim().to_owned()).unwrap_or(error)
}

async fn lead(member: &mut Member) {
    member.lead_alone().await;
    member
        .sql(
            "create role maas login password 'geheim';
             create role prep login password U&'\\2168';
             create role expired login password 'geheim' valid until '2001-01-01';
             create role future login password 'geheim' valid until '2999-01-01';
             create role forever login password 'geheim' valid until 'infinity';
             create role dead login password 'geheim' valid until '-infinity';
             create role grp password 'geheim';
             create role bare login;
             create role one login password 'geheim' connection limit 0;
             set password_encryption = 'md5'; create role old login password 'geheim';",
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn real_clients_come_in_with_the_key_that_their_proof_gave() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a"]);
    let mut member = cluster.member("node-a");
    lead(&mut member).await;
    let certificates = Certificates::new();
    let acceptor = Acceptor::start(&member, vec![AccessRule::default()], Some(certificates.server())).await;
    let at = acceptor.address;
    let who = "select current_user";

    for (settings, password) in [
        ("user=maas dbname=postgres sslmode=disable", "geheim"),
        ("user=maas dbname=postgres sslmode=prefer", "geheim"),
        ("user=maas dbname=postgres sslmode=require channel_binding=require", "geheim"),
        ("user=maas dbname=postgres sslmode=require channel_binding=disable", "geheim"),
        ("user=future dbname=postgres", "geheim"),
        ("user=forever dbname=postgres", "geheim"),
        // SASLprep makes IX of the Roman nine, on both sides.
        ("user=prep dbname=postgres client_encoding=UTF8", "IX"),
        ("user=prep dbname=postgres client_encoding=UTF8", "\u{2168}"),
    ] {
        let user = settings.split([' ', '=']).nth(1).unwrap();
        assert_eq!(says(at, settings, password, who).await, user, "{settings}");
    }
    let ca = certificates.path("ca.pem");
    let full =
        format!("user=maas dbname=postgres sslmode=verify-full channel_binding=require sslrootcert={}", ca.display());
    assert_eq!(says(at, &full, "geheim", who).await, "maas");

    // Another driver.
    let config = format!("host=127.0.0.1 port={} user=maas password=geheim dbname=postgres", at.port());
    let (client, connection) = tokio_postgres::connect(&config, NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    let row = client.query_one("select current_user::text, $1::int + 1", &[&1]).await.unwrap();
    assert_eq!((row.get::<_, String>(0), row.get::<_, i32>(1)), ("maas".to_owned(), 2));
    drop(client);
    connection.await.unwrap().unwrap();

    // Rights and limits are PostgreSQL's; a new password counts at once, and so does a new role.
    assert!(fatal(at, "user=one dbname=postgres", "geheim").await.contains("too many connections for role \"one\""));
    assert!(fatal(at, "user=maas dbname=nowhere", "geheim").await.contains("database \"nowhere\" does not exist"));
    member.sql("alter role maas password 'neu'; create role fresh login password 'geheim'").await;
    assert_eq!(says(at, "user=maas dbname=postgres", "neu", who).await, "maas");
    assert!(fatal(at, "user=maas dbname=postgres", "geheim").await.contains("password authentication failed"));
    assert_eq!(says(at, "user=fresh dbname=postgres", "geheim", who).await, "fresh");
}

/// Every refusal in PostgreSQL's own words, side by side with its own port.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_postgresqls() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a"]);
    let mut member = cluster.member("node-a");
    lead(&mut member).await;
    let acceptor = Acceptor::start(&member, vec![AccessRule::default()], None).await;
    let (ours, theirs) = (acceptor.address, SocketAddr::from(([127, 0, 0, 1], member.config.postgresql.port)));
    let hint = "\nHINT:  The endpoint takes SCRAM passwords only";
    for (user, password) in [
        ("maas", "wrong"),
        ("nobody", "geheim"),
        ("expired", "geheim"),
        ("dead", "geheim"),
        ("bare", "geheim"),
        ("grp", "geheim"),
        ("grp", "wrong"),
        ("one", "geheim"),
        ("old", "geheim"),
    ] {
        let settings = format!("user={user} dbname=postgres");
        let said = fatal(ours, &settings, password).await;
        let said = said.split_once(hint).map_or(said.as_str(), |(said, _)| said).to_owned();
        assert_eq!(said, fatal(theirs, &settings, password).await, "{user}");
    }
    assert!(fatal(ours, "user=maas dbname=postgres", "wrong").await.contains("password_encryption"));
    assert!(fatal(ours, "user=postgres dbname=postgres", "super secret").await.contains("superuser \"postgres\""));
    // pgvigil's own roles do not exist here, whatever password is shown.
    let internal = r"internal: it's \secret";
    for own in ["pgvigil", "pgvigil_replication", "pgvigil_rewind", "pgvigil_endpoint"] {
        let said = fatal(ours, &format!("user={own} dbname=postgres"), internal).await;
        assert!(said.starts_with(&format!("password authentication failed for user \"{own}\"")), "{said}");
    }
    // Without TLS a client that insists on it goes away by itself.
    let output = psql(ours, "user=maas dbname=postgres sslmode=require", "geheim", "select 1").await;
    assert!(String::from_utf8_lossy(&output.stderr).contains("server does not support SSL"));
    let output = psql(ours, "user=maas dbname=postgres channel_binding=require", "geheim", "select 1").await;
    assert!(String::from_utf8_lossy(&output.stderr).contains("channel binding required"));
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_and_certificates_hold_for_real_clients() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a"]);
    let mut member = cluster.member("node-a");
    lead(&mut member).await;
    let certificates = Certificates::new();
    let rule = AccessRule::default;
    let rules = vec![
        AccessRule { user: "future".into(), client_cert: ClientCert::VerifyFull, tls: true, ..rule() },
        AccessRule { user: "forever".into(), method: AccessMethod::Reject, ..rule() },
        AccessRule { user: "bare".into(), method: AccessMethod::Cert, tls: true, ..rule() },
        AccessRule { user: "postgres".into(), ..rule() },
        AccessRule { user: "maas".into(), tls: true, ..rule() },
    ];
    let acceptor = Acceptor::start(&member, rules, Some(certificates.server())).await;
    let at = acceptor.address;
    let with = |user: &str, certificate: &str| {
        let (cert, key) = certificates.issue(certificate);
        format!("user={user} dbname=postgres sslmode=require sslcert={} sslkey={}", cert.display(), key.display())
    };
    assert_eq!(says(at, &with("future", "future"), "geheim", "select current_user").await, "future");
    let other = fatal(at, &with("future", "maas"), "geheim").await;
    assert!(other.contains("certificate authentication failed for user \"future\""), "{other}");
    let none = fatal(at, "user=future dbname=postgres sslmode=require", "geheim").await;
    assert!(none.contains("requires a valid client certificate"), "{none}");
    // The certificate lets the client in; the backend still wants what it cannot give, and the answer says what to do.
    let bare = fatal(at, &with("bare", "bare"), "").await;
    assert!(bare.contains("postgresql.hba") && bare.contains("client_cert"), "{bare}");
    assert!(fatal(at, "user=forever dbname=postgres", "geheim").await.contains("rule 2 of endpoint.allow rejects"));
    assert!(fatal(at, "user=maas dbname=postgres sslmode=disable", "geheim").await.contains("asks for TLS"));
    assert_eq!(says(at, "user=postgres dbname=postgres", "super secret", "select current_user").await, "postgres");
    assert!(fatal(at, "user=grp dbname=postgres", "geheim").await.contains("no rule of endpoint.allow"));
}

/// A standby has the same roles; while PostgreSQL is away the last ones serve.
#[tokio::test(flavor = "multi_thread")]
async fn roles_are_read_on_a_standby_by_a_role_that_can_do_nothing_else() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let (mut a, mut b) = (cluster.member("node-a"), cluster.member("node-b"));
    lead(&mut a).await;
    b.join(&a, 1).await;
    let source = local_roles(&b, b.config.postgresql.internal_password.clone());
    let records = source.records().await.unwrap();
    let role = |name: &str| records.iter().find(|r| r.name == name);
    assert!(role("maas").unwrap().stored.as_ref().unwrap().starts_with("SCRAM-SHA-256$4096:"));
    assert!(role("postgres").unwrap().superuser && !role("grp").unwrap().can_login);
    assert_eq!((role("forever").unwrap().valid_until_ms, role("dead").unwrap().valid_until_ms), (None, Some(0)));
    assert_eq!(role("expired").unwrap().valid_until_ms.map(|ms| ms / 86_400_000), Some(11_323));
    assert!(role("pgvigil").is_none() && role("pgvigil_endpoint").is_none());

    let cache =
        RoleCache::start(Arc::new(local_roles(&b, Secret::new("internal: it's \\secret"))), Patience::default());
    assert!(cache.roles().await.unwrap().get("maas").is_some());
    b.end(nix::sys::signal::Signal::SIGQUIT);
    tokio::time::timeout(Duration::from_secs(2), async {
        assert!(cache.roles().await.unwrap().get("maas").is_some());
    })
    .await
    .expect("the last roles, soon");
    let silent = local_roles(&b, Secret::new("x")).fetch().await.unwrap_err();
    assert!(silent.contains("connect"), "{silent}");

    // What it may not do, and what others may not.
    let client = a.client().await;
    client.batch_execute("set session authorization pgvigil_endpoint").await.unwrap();
    assert!(client.batch_execute("select * from pgvigil.login_roles()").await.is_ok());
    for forbidden in [
        "select rolpassword from pg_authid",
        "create table public.t ()",
        "select pg_reload_conf()",
        "alter role maas password 'x'",
    ] {
        assert!(client.batch_execute(forbidden).await.is_err(), "{forbidden}");
    }
    client.batch_execute("set session authorization maas").await.unwrap();
    assert!(client.batch_execute("select * from pgvigil.login_roles()").await.is_err());
}
