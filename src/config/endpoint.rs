//! `[endpoint.tls]` and `[[endpoint.allow]]`, from the file to what can be relied on.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::access::{AccessMethod, AccessRule, AddressPattern, ClientCert};
use super::check::Check;
use super::error::nearest;
use super::{ConfigError, raw};

/// Who may come in, and under which certificate we are met.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointAccess {
    /// `None`: clients are told that there is no TLS.
    pub tls: Option<EndpointTls>,
    /// Never empty.
    pub allow: Vec<AccessRule>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointTls {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    /// Whose signatures on clients' certificates count.
    pub client_ca_file: Option<PathBuf>,
    /// Else 1.2 too.
    pub tls_1_3_only: bool,
}

impl Default for EndpointAccess {
    fn default() -> EndpointAccess {
        EndpointAccess { tls: None, allow: vec![AccessRule::default()] }
    }
}

pub(super) fn access(
    check: &Check<'_>,
    tls: raw::EndpointTls,
    rules: Vec<raw::Allow>,
) -> Result<EndpointAccess, ConfigError> {
    let tls = self::tls(check, tls)?;
    if rules.is_empty() {
        return Ok(EndpointAccess { tls, ..EndpointAccess::default() });
    }
    let mut allow: Vec<AccessRule> = Vec::with_capacity(rules.len());
    for (index, entry) in rules.into_iter().enumerate() {
        let rule = rule(check, index, entry, tls.as_ref())?;
        if let Some(before) = allow.iter().position(|before| covers(before, &rule)) {
            return Err(check.error(
                &format!("endpoint.allow[{index}]"),
                format!(
                    "rule {} matches all that rule {} matches, so this one is never reached",
                    before + 1,
                    index + 1
                ),
                "put the narrower rule first, or take it out",
            ));
        }
        allow.push(rule);
    }
    Ok(EndpointAccess { tls, allow })
}

fn tls(check: &Check<'_>, raw: raw::EndpointTls) -> Result<Option<EndpointTls>, ConfigError> {
    let cert_file = check.path("endpoint.tls.cert_file", raw.cert_file)?;
    let key_file = check.path("endpoint.tls.key_file", raw.key_file)?;
    let client_ca_file = check.path("endpoint.tls.client_ca_file", raw.client_ca_file)?;
    let tls_1_3_only = match raw.min_version.as_deref() {
        None | Some("1.2") => false,
        Some("1.3") => true,
        Some(other) => {
            let remedy = r#"write "1.2" or "1.3"; older versions are not spoken"#;
            return Err(check.error("endpoint.tls.min_version", format!("`{other}` is not one of them"), remedy));
        }
    };
    match (cert_file, key_file) {
        (None, None) if client_ca_file.is_some() => Err(check.error(
            "endpoint.tls.client_ca_file",
            "is given, and there is no endpoint.tls.cert_file",
            "clients show certificates inside TLS only: name cert_file and key_file too",
        )),
        (None, None) => Ok(None),
        (Some(_), None) => Err(check.error(
            "endpoint.tls.key_file",
            "is missing beside endpoint.tls.cert_file",
            "name the key of the certificate, a PEM file of mode 0600",
        )),
        (None, Some(_)) => Err(check.error(
            "endpoint.tls.cert_file",
            "is missing beside endpoint.tls.key_file",
            "name the certificate, a PEM file with the whole chain",
        )),
        (Some(cert_file), Some(key_file)) => {
            Ok(Some(EndpointTls { cert_file, key_file, client_ca_file, tls_1_3_only }))
        }
    }
}

fn rule(
    check: &Check<'_>,
    index: usize,
    raw: raw::Allow,
    tls: Option<&EndpointTls>,
) -> Result<AccessRule, ConfigError> {
    let field = |key: &str| format!("endpoint.allow[{index}].{key}");
    let name = |key: &str, value: Option<String>| match value {
        Some(text) if text.is_empty() || text.contains('\0') => Err(check.error(
            &field(key),
            format!("`{}` is not a name", text.escape_debug()),
            r#"write a name, or "all""#,
        )),
        Some(text) => Ok(text),
        None => Ok("all".to_owned()),
    };
    let address = raw.address.as_deref().unwrap_or("all");
    let address: AddressPattern = address.parse().map_err(|why: String| {
        check.error(&field("address"), why, r#"write "10.0.0.0/8", "10.0.0.1", "fd00::/8", "loopback" or "all""#)
    })?;
    let method = one_of(
        check,
        &field("method"),
        raw.method.as_deref(),
        &[("scram", AccessMethod::Scram), ("cert", AccessMethod::Cert), ("reject", AccessMethod::Reject)],
    )?;
    let client_cert = one_of(
        check,
        &field("client_cert"),
        raw.client_cert.as_deref(),
        &[("none", ClientCert::None), ("verify-ca", ClientCert::VerifyCa), ("verify-full", ClientCert::VerifyFull)],
    )?;
    let needs_certificate = method == AccessMethod::Cert || client_cert != ClientCert::None;
    let mut require = one_of(check, &field("tls"), raw.tls.as_deref(), &[("allow", false), ("require", true)])?;
    if needs_certificate {
        let because = if method == AccessMethod::Cert { "method = \"cert\"" } else { "client_cert" };
        if tls.and_then(|tls| tls.client_ca_file.as_ref()).is_none() {
            return Err(check.error(
                &field(if method == AccessMethod::Cert { "method" } else { "client_cert" }),
                format!("{because} needs to know whose certificates count, and endpoint.tls.client_ca_file is missing"),
                "name the PEM file of the clients' authority there",
            ));
        }
        if raw.tls.as_deref() == Some("allow") {
            return Err(check.error(
                &field("tls"),
                format!("\"allow\" contradicts {because}: a certificate is shown inside TLS only"),
                r#"write "require", or leave it away"#,
            ));
        }
        require = true;
    }
    if require && tls.is_none() {
        return Err(check.error(
            &field("tls"),
            "\"require\" and no endpoint.tls.cert_file: nobody could come in by this rule",
            "name certificate and key in [endpoint.tls]",
        ));
    }
    Ok(AccessRule {
        user: name("user", raw.user)?.as_str().into(),
        database: name("database", raw.database)?.as_str().into(),
        address,
        tls: require,
        method,
        client_cert,
    })
}

/// A word out of a few; the first one is the default.
fn one_of<T: Copy>(check: &Check<'_>, field: &str, value: Option<&str>, words: &[(&str, T)]) -> Result<T, ConfigError> {
    let Some(value) = value else { return Ok(words[0].1) };
    words.iter().find(|(word, _)| *word == value).map(|(_, meaning)| *meaning).ok_or_else(|| {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        // People come from pg_hba.conf.
        let remedy = match value {
            "scram-sha-256" => "write \"scram\"".to_owned(),
            "md5" | "password" | "trust" | "peer" | "ident" | "ldap" => format!(
                "the endpoint knows {}; for other methods let clients reach PostgreSQL's own port (postgresql.hba)",
                known.join(", ")
            ),
            _ => match nearest(value, known.iter().copied()) {
                Some(near) => format!("did you mean \"{near}\"?"),
                None => format!("write one of {}", known.join(", ")),
            },
        };
        check.error(field, format!("`{value}` is unknown"), remedy)
    })
}

/// Whatever `later` matches, `before` matches already. Rules that let people in by different names are not compared.
fn covers(before: &AccessRule, later: &AccessRule) -> bool {
    use super::access::{DatabasePattern as Database, UserPattern as User};
    let user = before.user == later.user || before.user == User::All;
    let database = before.database == later.database
        || (before.database == Database::All && later.database != Database::Replication);
    let address = before.address == later.address || before.address == AddressPattern::All;
    user && database && address
}
