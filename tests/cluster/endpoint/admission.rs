//! Who comes in through the endpoints of a real cluster, and in which words others are refused.

use std::os::unix::fs::PermissionsExt as _;

use rcgen::{CertificateParams, KeyPair};

use super::*;

/// psql with its own words for the connection; what it printed, or the sentence behind `FATAL:`.
async fn connect(port: u16, settings: &str, password: &str) -> Result<String, String> {
    let output = tokio::process::Command::new("psql")
        .args(["-XAtw", "-d", &format!("host=127.0.0.1 port={port} {settings}"), "-c", "SELECT current_user"])
        .env("PGPASSWORD", password)
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_come_in_over_tls_through_every_member_and_strangers_do_not() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap();
    let (cert_file, key_file) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
    std::fs::write(&cert_file, certificate.pem()).unwrap();
    std::fs::write(&key_file, key.serialize_pem()).unwrap();
    std::fs::set_permissions(&key_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let lines = format!(
        "direct = true\n[endpoint.tls]\ncert_file = {:?}\nkey_file = {:?}\n\
         [[endpoint.allow]]\nuser = \"app\"\n[[endpoint.allow]]\nuser = \"strict\"\ntls = \"require\"\n\
         [[endpoint.allow]]\nuser = \"nobody\"\n",
        cert_file, key_file
    );
    let (cluster, primary) = playing(options(&lines)).await;
    let admin = sql::connect(cluster.members[primary].port, &Login::superuser(), PATIENCE).await.unwrap();
    admin.batch_execute("CREATE ROLE strict LOGIN PASSWORD 'geheim'").await.unwrap();

    for member in 0..cluster.members.len() {
        let port = cluster.members[member].endpoint_port;
        let come = async |settings: &str, password: &str| connect(port, settings, password).await;
        let bound = "user=app dbname=app sslmode=require channel_binding=require";
        assert_eq!(come(bound, "app").await.as_deref(), Ok("app"), "{member}");
        assert_eq!(come("user=app dbname=app sslmode=disable", "app").await.as_deref(), Ok("app"), "{member}");
        let wrong = come("user=app dbname=app", "wrong").await.unwrap_err();
        assert!(wrong.contains("FATAL:  password authentication failed for user \"app\""), "{wrong}");
        let nobody = come("user=nobody dbname=app", "wrong").await.unwrap_err();
        assert!(nobody.contains("FATAL:  password authentication failed for user \"nobody\""), "{nobody}");
        let unknown = come("user=eve dbname=app", "x").await.unwrap_err();
        assert!(unknown.contains("no rule of endpoint.allow for host \"127.0.0.1\", user \"eve\""), "{unknown}");
        // Encrypted to this front, whichever gate it leads to; a role made on the primary just now.
        let encrypted = "user=strict dbname=postgres sslmode=require";
        assert_eq!(come(encrypted, "geheim").await.as_deref(), Ok("strict"), "{member}");
        let clear = come("user=strict dbname=postgres sslmode=disable", "geheim").await.unwrap_err();
        assert!(clear.contains("asks for TLS"), "{clear}");
    }
    leaves_nothing(cluster).await;
}
