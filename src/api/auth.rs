//! Who may change something: whoever shows the token, or, where none is configured, whoever is on this host.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::ApiError;
use crate::core::peers;

/// The other end of the connection; the server puts it into every request.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// Stands before every route, the unknown ones too.
pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if request.method().is_safe() {
        return next.run(request).await;
    }
    let peer = request.extensions().get::<Peer>().copied();
    let token = app.token.as_ref().map(|token| token.expose());
    let admitted = match request.uri().path() {
        peers::PATH => admit_agent(token, request.headers()),
        _ => admit(token, request.headers(), peer),
    };
    match admitted {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

fn admit(token: Option<&str>, headers: &HeaderMap, peer: Option<Peer>) -> Result<(), ApiError> {
    let Some(token) = token else {
        return admit_without_token(headers, peer);
    };
    let shown = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    match shown.and_then(bearer) {
        Some(shown) if equal(shown, token.as_bytes()) => Ok(()),
        Some(_) => Err(unauthorized("the token is not the configured one")),
        None => Err(unauthorized("this needs a token")),
    }
}

/// Other agents come from other hosts, and what they ask for changes nothing here.
fn admit_agent(token: Option<&str>, headers: &HeaderMap) -> Result<(), ApiError> {
    match token {
        Some(_) => admit(token, headers, None),
        None if headers.contains_key(header::ORIGIN) => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "agents are no web pages",
            "this path is for the agents of the cluster",
        )),
        None => Ok(()),
    }
}

fn admit_without_token(headers: &HeaderMap, peer: Option<Peer>) -> Result<(), ApiError> {
    if !peer.is_some_and(|peer| is_loopback(peer.0.ip())) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "no token is configured, so changes are accepted from this host only",
            "set the same api.token on every member and send `Authorization: Bearer …`, or ask on the member itself",
        ));
    }
    // Being on this host is all that is asked here, and every web page in a browser on it could say so.
    if headers.contains_key(header::ORIGIN) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "no token is configured, so changes are not accepted from web pages",
            "set api.token and send `Authorization: Bearer …`, or use the command line",
        ));
    }
    Ok(())
}

fn unauthorized(error: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, error, "send `Authorization: Bearer …` with the configured api.token")
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| rest.trim_ascii())
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Takes as long for a token that is wrong in its first byte as for one that is wrong in its last.
fn equal(shown: &[u8], expected: &[u8]) -> bool {
    let mut difference = u8::from(shown.len() != expected.len());
    for (i, byte) in shown.iter().enumerate() {
        // The length of the expected token may show, its bytes may not; an empty one never matches.
        let other = expected.get(i % expected.len().max(1)).copied().unwrap_or(!byte);
        difference |= std::hint::black_box(byte ^ other);
    }
    difference == 0 && !expected.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(token: Option<&str>, authorization: Option<&str>, peer: &str) -> u16 {
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        let peer = Peer(SocketAddr::new(peer.parse().unwrap(), 1));
        admit(token, &headers, Some(peer)).map_or_else(|e| e.status.as_u16(), |()| 200)
    }

    #[test]
    fn a_configured_token_is_what_counts() {
        let cases = [
            (Some("Bearer secret"), 200),
            (Some("bearer  secret "), 200),
            (Some("Bearer secre"), 401),
            (Some("Bearer secrets"), 401),
            (Some("Bearer secretsecret"), 401),
            (Some("Bearer "), 401),
            (Some("Bearer"), 401),
            (Some("Basic secret"), 401),
            (None, 401),
        ];
        for (authorization, expected) in cases {
            assert_eq!(status(Some("secret"), authorization, "127.0.0.1"), expected, "{authorization:?}");
        }
        assert_eq!(status(Some(""), Some("Bearer "), "127.0.0.1"), 401);
    }

    #[test]
    fn without_a_token_only_this_host_may_change_things() {
        for (peer, expected) in [
            ("127.0.0.1", 200),
            ("127.8.0.1", 200),
            ("::1", 200),
            ("::ffff:127.0.0.1", 200),
            ("10.0.0.1", 403),
            ("::2", 403),
        ] {
            assert_eq!(status(None, None, peer), expected, "{peer}");
        }
        assert!(admit(None, &HeaderMap::new(), None).is_err());
        let from_a_page = HeaderMap::from_iter([(header::ORIGIN, "http://localhost:3000".parse().unwrap())]);
        let local = Peer("127.0.0.1:1".parse().unwrap());
        assert!(admit(None, &from_a_page, Some(local)).is_err());
    }
}
