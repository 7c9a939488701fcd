use std::os::unix::fs::PermissionsExt as _;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SignatureAlgorithm,
};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio_rustls::TlsConnector;

use super::*;

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Issuer {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Certificate and key, PEM.
fn issue(authority: &Issuer, common_name: &str, names: &[&str]) -> (String, String) {
    let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    if !common_name.is_empty() {
        params.distinguished_name.push(DnType::CommonName, common_name);
    }
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, authority).unwrap().pem(), key.serialize_pem())
}

struct Files {
    directory: tempfile::TempDir,
    authority: Issuer,
}

impl Files {
    fn new() -> Files {
        let files = Files { directory: tempfile::tempdir().unwrap(), authority: authority("clients and servers") };
        files.write("ca.pem", &files.authority.pem());
        files.renew("endpoint");
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// By a rename, as certbot and the like do.
    fn write(&self, name: &str, text: &str) {
        let fresh = self.path(&format!("{name}.new"));
        fs::write(&fresh, text).unwrap();
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(fresh, self.path(name)).unwrap();
    }

    fn renew(&self, name: &str) {
        let (certificate, key) = issue(&self.authority, name, &["db.example"]);
        self.write("cert.pem", &certificate);
        self.write("key.pem", &key);
    }

    fn tls(&self) -> EndpointTls {
        EndpointTls {
            cert_file: self.path("cert.pem"),
            key_file: self.path("key.pem"),
            client_ca_file: Some(self.path("ca.pem")),
            tls_1_3_only: false,
        }
    }

    fn client(&self, alpn: &[&[u8]], certificate: Option<(String, String)>) -> ClientConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_root_certificates(roots(&self.path("ca.pem")).unwrap());
        let mut config = match certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
            }
        };
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config
    }
}

/// What the server makes of a client; the client reads to the end, so that refusals after its own handshake are seen.
async fn handshake(server: &ServerTls, way: Way, client: ClientConfig) -> io::Result<TlsFacts> {
    let (near, far) = duplex(16 << 10);
    let name = ServerName::try_from("db.example").unwrap();
    let connect = async {
        let mut stream = TlsConnector::from(Arc::new(client)).connect(name, far).await?;
        let _ = stream.read(&mut [0; 1]).await;
        io::Result::Ok(())
    };
    let accept = async {
        let (mut stream, facts) = server.accept(near, way).await?;
        let _ = stream.shutdown().await;
        Ok(facts)
    };
    tokio::join!(accept, connect).0
}

#[tokio::test]
async fn direct_tls_needs_the_protocols_name_and_asked_tls_does_not() {
    let files = Files::new();
    let server = ServerTls::read(&files.tls()).unwrap();
    let ours: &[&[u8]] = &[b"postgresql"];
    assert!(handshake(&server, Way::Direct, files.client(ours, None)).await.is_ok());
    assert!(handshake(&server, Way::Asked, files.client(ours, None)).await.is_ok());
    assert!(handshake(&server, Way::Asked, files.client(&[], None)).await.is_ok());
    assert!(handshake(&server, Way::Direct, files.client(&[], None)).await.is_err(), "no ALPN");
    for way in [Way::Direct, Way::Asked] {
        assert!(handshake(&server, way, files.client(&[b"h2"], None)).await.is_err(), "another protocol's client");
    }
}

#[tokio::test]
async fn client_certificates_are_verified_and_read() {
    let files = Files::new();
    let server = ServerTls::read(&files.tls()).unwrap();
    assert!(handshake(&server, Way::Asked, files.client(&[], None)).await.unwrap().certificate.is_none());

    let good = issue(&files.authority, "region-a", &["a.example"]);
    let certificate = handshake(&server, Way::Asked, files.client(&[], Some(good))).await.unwrap().certificate.unwrap();
    assert!(certificate.is_for("region-a") && !certificate.is_for("region"));
    assert_eq!(
        (certificate.consumer(), certificate.alternative.as_slice()),
        (Some("region-a"), ["a.example".to_owned()].as_slice())
    );

    let nameless = issue(&files.authority, "", &["a.example"]);
    let certificate =
        handshake(&server, Way::Asked, files.client(&[], Some(nameless))).await.unwrap().certificate.unwrap();
    assert!(!certificate.is_for("a.example") && !certificate.is_for(""));
    assert_eq!(certificate.consumer(), Some("a.example"));

    let forged = issue(&authority("clients and servers"), "region-a", &[]);
    assert!(handshake(&server, Way::Asked, files.client(&[], Some(forged))).await.is_err());
}

#[test]
fn a_name_with_a_zero_in_it_is_no_name() {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "maas\0.evil.example");
    let certificate = params.self_signed(&key).unwrap();
    assert!(ClientCertificate::read(certificate.der()).is_err());
    assert!(ClientCertificate::read(b"nonsense").is_err());
}

#[test]
fn the_end_point_is_the_certificate_under_the_hash_of_its_signature() {
    let signed = |algorithm: &'static SignatureAlgorithm| {
        let key = KeyPair::generate_for(algorithm).unwrap();
        CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap().der().to_vec()
    };
    let length = |algorithm| end_point(&signed(algorithm)).map(|hash| hash.len());
    assert_eq!(length(&rcgen::PKCS_ECDSA_P256_SHA256), Some(32));
    assert_eq!(length(&PKCS_ECDSA_P384_SHA384), Some(48));
    assert_eq!(length(&PKCS_ED25519), None);
    assert_eq!(end_point(b"nonsense"), None);
}

#[tokio::test]
async fn tls_1_2_can_be_left_out() {
    let files = Files::new();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let only_12 = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots(&files.path("ca.pem")).unwrap())
        .with_no_client_auth();
    let both = ServerTls::read(&files.tls()).unwrap();
    assert!(handshake(&both, Way::Asked, only_12.clone()).await.is_ok());
    let only_13 = ServerTls::read(&EndpointTls { tls_1_3_only: true, ..files.tls() }).unwrap();
    assert!(handshake(&only_13, Way::Asked, only_12).await.is_err());
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let files = Files::new();
    let error = |tls: EndpointTls| ServerTls::read(&tls).err().unwrap().to_string();
    let missing = error(EndpointTls { cert_file: files.path("no.pem"), ..files.tls() });
    assert!(missing.contains("no.pem") && missing.contains("No such file"), "{missing}");
    let swapped = error(EndpointTls { cert_file: files.path("key.pem"), ..files.tls() });
    assert!(swapped.contains("holds no certificate"), "{swapped}");
    let no_key = error(EndpointTls { key_file: files.path("cert.pem"), ..files.tls() });
    assert!(no_key.contains("holds no private key"), "{no_key}");

    let (_, other_key) = issue(&files.authority, "other", &[]);
    files.write("key.pem", &other_key);
    let mismatch = error(files.tls());
    assert!(mismatch.contains("cert.pem: certificate and key"), "{mismatch}");

    fs::set_permissions(files.path("key.pem"), fs::Permissions::from_mode(0o644)).unwrap();
    let open = error(files.tls());
    assert!(open.contains("mode 0644") && open.contains("chmod 0600"), "{open}");
}

// Real time: the files' own times are.
#[tokio::test]
async fn changed_files_are_read_again_and_bad_ones_are_not() {
    let files = Files::new();
    let again = Arc::new(Notify::new());
    let (current, keeping) = keep(files.tls(), Duration::from_millis(10), again.clone()).unwrap();
    let keeping = tokio::spawn(keeping);
    let first = current.get();
    let changed = async |from: &Arc<ServerTls>| {
        let mut watch = current.0.clone();
        let wait = watch.wait_for(|now| !Arc::ptr_eq(now, from));
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap().unwrap().clone()
    };

    files.renew("endpoint, again");
    // Certificate first, key later: what is between cannot be used, and is not.
    let mut second = changed(&first).await;
    assert_ne!(second.end_point(), first.end_point());

    files.write("cert.pem", "nonsense");
    again.notify_one();
    tokio::time::sleep(Duration::from_millis(100)).await;
    second = current.get();
    assert!(handshake(&second, Way::Asked, files.client(&[], None)).await.is_ok(), "the old one is kept");

    files.renew("endpoint, once more");
    let third = changed(&second).await;
    assert_ne!(third.end_point(), second.end_point());
    assert!(handshake(&third, Way::Asked, files.client(&[], None)).await.is_ok());
    keeping.abort();
}

#[tokio::test]
async fn between_endpoints_both_sides_show_a_certificate_of_the_cluster() {
    let files = Files::new();
    let (cert, key, ca) = (files.path("cert.pem"), files.path("key.pem"), files.path("ca.pem"));
    let alpn = b"pgvigil-roles/1".as_slice();
    let server = Arc::new(peer_server(&cert, &key, &ca, &[alpn]).unwrap());
    let meet = async |client: ClientConfig| {
        let (near, far) = duplex(16 << 10);
        let connect = async {
            let name = ServerName::try_from("db.example").unwrap();
            let mut stream = TlsConnector::from(Arc::new(client)).connect(name, far).await?;
            stream.read(&mut [0; 1]).await
        };
        let accept = async {
            let mut stream = TlsAcceptor::from(server.clone()).accept(near).await?;
            stream.shutdown().await
        };
        let (accepted, _) = tokio::join!(accept, connect);
        accepted
    };
    meet(peer_client(&cert, &key, &ca, alpn).unwrap()).await.unwrap();
    assert!(meet(files.client(&[alpn], None)).await.is_err(), "no certificate");
    let forged = issue(&authority("clients and servers"), "node-a", &[]);
    assert!(meet(files.client(&[alpn], Some(forged))).await.is_err());
    assert!(meet(peer_client(&cert, &key, &ca, b"http/1.1").unwrap()).await.is_err(), "another protocol");
}
