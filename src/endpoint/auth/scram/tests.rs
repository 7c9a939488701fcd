use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use postgres_protocol::password::scram_sha_256;
use proptest::prelude::*;

use super::*;
use crate::endpoint::auth::verifier::MockSecret;

const PENCIL: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:\
                      wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

fn exchange(verifier: &str, end_point: Option<&'static [u8]>) -> Exchange<'static> {
    Exchange { verifier: verifier.parse().unwrap(), doomed: false, end_point, nonce: "ours".into() }
}

/// `pencil` and the client's words, with our nonce of the vector.
fn rfc7677(verifier: &str, doomed: bool) -> (String, Challenged) {
    let nonce = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0".into();
    let exchange = Exchange { verifier: verifier.parse().unwrap(), doomed, end_point: None, nonce };
    exchange.challenge(Mechanism::Scram, b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO").unwrap()
}

const RFC7677_FINAL: &[u8] = b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                               p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";

#[test]
fn the_vector_of_rfc_7677() {
    let (server_first, challenged) = rfc7677(PENCIL, false);
    assert_eq!(server_first, "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096");
    let proven = challenged.check(RFC7677_FINAL).unwrap();
    assert_eq!(proven.server_final, "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    assert!(proven.client_key.hash().equals(&proven.verifier.stored_key));
}

#[test]
fn a_right_proof_under_a_doomed_exchange_is_denied() {
    let (_, challenged) = rfc7677(PENCIL, true);
    assert_eq!(challenged.check(RFC7677_FINAL).err(), Some(ScramError::Denied));
}

#[test]
fn another_proof_is_denied() {
    let (_, challenged) = rfc7677(PENCIL, false);
    let wrong = String::from_utf8(RFC7677_FINAL.to_vec()).unwrap().replace("p=dHzb", "p=dHzc");
    assert_eq!(challenged.check(wrong.as_bytes()).err(), Some(ScramError::Denied));
}

/// libpq's words through another implementation's client, with a password that SASLprep changes.
fn by_client(
    password: &str,
    stored: &str,
    binding: ChannelBinding,
    exchange: Exchange<'_>,
) -> Result<Keys, ScramError> {
    assert!(stored.starts_with("SCRAM-SHA-256$"));
    let plus = exchange.end_point.is_some();
    let mechanism = if plus { Mechanism::ScramPlus } else { Mechanism::Scram };
    let mut client = ScramSha256::new(password.as_bytes(), binding);
    let (server_first, challenged) = exchange.challenge(mechanism, client.message())?;
    client.update(server_first.as_bytes()).unwrap();
    let proven = challenged.check(client.message())?;
    client.finish(proven.server_final.as_bytes()).unwrap();
    Ok(proven.keys())
}

#[test]
fn another_implementation_gets_in_with_and_without_channel_binding() {
    for password in ["geheim", "", "pa,ss=word", "\u{2168}", "I\u{00AD}X", "\u{00AA}", "ü\u{00a0}x", "\u{7}bell"] {
        let stored = scram_sha_256(password.as_bytes());
        by_client(password, &stored, ChannelBinding::unsupported(), exchange(&stored, None)).unwrap();
        by_client(password, &stored, ChannelBinding::unrequested(), exchange(&stored, None)).unwrap();
        let end_point = ChannelBinding::tls_server_end_point(b"hash".to_vec());
        by_client(password, &stored, end_point, exchange(&stored, Some(b"hash"))).unwrap();
    }
    let stored = scram_sha_256("IX".as_bytes());
    by_client("\u{2168}", &stored, ChannelBinding::unsupported(), exchange(&stored, None)).unwrap();
}

#[test]
fn a_client_that_saw_another_certificate_is_refused() {
    let stored = scram_sha_256(b"geheim");
    let other = ChannelBinding::tls_server_end_point(b"other".to_vec());
    let error = by_client("geheim", &stored, other, exchange(&stored, Some(b"hash"))).unwrap_err();
    assert_eq!((error.clone(), error.sqlstate()), (ScramError::Binding, "28000"));
}

/// Flag, mechanism and offer: all that PostgreSQL distinguishes.
#[test]
fn the_channel_binding_flag_is_held_against_the_offer() {
    use Mechanism::{Scram, ScramPlus};
    let challenge = |tls: bool, mechanism, message: &str| {
        let exchange = exchange(PENCIL, tls.then_some(b"hash".as_slice()));
        exchange.challenge(mechanism, message.as_bytes()).map(|_| ()).map_err(|e| e.sqlstate())
    };
    for tls in [false, true] {
        assert_eq!(challenge(tls, Scram, "n,,n=,r=abc"), Ok(()), "a client without channel binding gets in");
        assert_eq!(challenge(tls, ScramPlus, "n,,n=,r=abc"), Err("08P01"));
        assert_eq!(challenge(tls, ScramPlus, "y,,n=,r=abc"), Err("08P01"));
        assert_eq!(challenge(tls, Scram, "p=tls-server-end-point,,n=,r=abc"), Err("08P01"));
        assert_eq!(challenge(tls, ScramPlus, "p=tls-unique,,n=,r=abc"), Err("08P01"));
    }
    assert_eq!(challenge(false, Scram, "y,,n=,r=abc"), Ok(()));
    assert_eq!(challenge(true, Scram, "y,,n=,r=abc"), Err("28000"), "the offer was taken away on the way");
    assert_eq!(challenge(true, ScramPlus, "p=tls-server-end-point,,n=,r=abc"), Ok(()));
}

#[test]
fn a_flag_cannot_be_changed_in_the_last_message() {
    let (_, challenged) = exchange(PENCIL, None).challenge(Mechanism::Scram, b"y,,n=,r=abc").unwrap();
    // "biws" is "n,,": the client would have said `n`.
    let error = challenged.check(b"c=biws,r=abcours,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=").err().unwrap();
    assert!(matches!(error, ScramError::Malformed(_)), "{error}");
}

#[test]
fn first_messages_that_are_refused() {
    let code = |message: &[u8]| exchange(PENCIL, None).challenge(Mechanism::Scram, message).err().unwrap().sqlstate();
    assert_eq!(code(b"n,a=admin,n=,r=abc"), "0A000");
    assert_eq!(code(b"n,,m=x,n=,r=abc"), "0A000");
    for malformed in [
        b"".as_slice(),
        b"n",
        b"n,",
        b"n,,",
        b"n,,n=",
        b"n,,n=,",
        b"n,,n=,r=",
        b"n,,n=,r=a b",
        b"n,,n=,r=a\0c",
        b"n,,n=,r=\xff",
        b"n,,r=abc",
        b"n,,n=,r=abc,",
        b"n,,n=,r=abc,1=2",
        b"nn,n=,r=abc",
        b"x,,n=,r=abc",
    ] {
        assert_eq!(code(malformed), "08P01", "{}", String::from_utf8_lossy(malformed));
    }
    let extended = exchange(PENCIL, None).challenge(Mechanism::Scram, b"n,,n=,r=abc,x=1,y=2");
    assert!(extended.is_ok(), "optional extensions are ignored");
}

#[test]
fn last_messages_that_are_refused() {
    let proof = "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    for (message, expected) in [
        (format!("c=biws,r=abcours,{proof}"), "28P01"),
        (format!("c=biws,r=abcours,x=1,{proof}"), "28P01"),
        (format!("c=biws,r=abcour,{proof}"), "08P01"),
        (format!("c=biws,r=abcoursX,{proof}"), "08P01"),
        (format!("c=eSws,r=abcours,{proof}"), "08P01"),
        (format!("r=abcours,{proof}"), "08P01"),
        ("c=biws,r=abcours".into(), "08P01"),
        ("c=biws,r=abcours,p=".into(), "08P01"),
        ("c=biws,r=abcours,p=AAAA".into(), "08P01"),
        (format!("c=biws,r=abcours,{proof},x=1"), "08P01"),
        (format!("c=biws,r=abcours,{proof}\0"), "08P01"),
    ] {
        let (_, challenged) = exchange(PENCIL, None).challenge(Mechanism::Scram, b"n,,n=,r=abc").unwrap();
        assert_eq!(challenged.check(message.as_bytes()).err().unwrap().sqlstate(), expected, "{message}");
    }
}

// === the way to the backend ===

/// Logs in with keys to a server (our own side of it) that holds `stored`.
fn log_in(keys: &Keys, stored: &str) -> Result<(), LoginError> {
    let login = Login::new(keys, "client".into());
    let (server_first, challenged) =
        exchange(stored, None).challenge(Mechanism::Scram, login.first().as_bytes()).unwrap();
    let (client_final, answered) = login.answer(server_first.as_bytes())?;
    answered.verify(challenged.check(client_final.as_bytes()).unwrap().server_final.as_bytes())
}

#[test]
fn the_recovered_key_logs_in_to_whoever_holds_the_same_verifier() {
    let stored = scram_sha_256(b"geheim");
    let keys = by_client("geheim", &stored, ChannelBinding::unsupported(), exchange(&stored, None)).unwrap();
    assert_eq!(log_in(&keys, &stored), Ok(()));
    // The same password under another salt is another verifier.
    assert_eq!(log_in(&keys, &scram_sha_256(b"geheim")), Err(LoginError::OtherVerifier));
}

#[test]
fn a_server_that_does_not_know_the_verifier_is_not_believed() {
    let stored = scram_sha_256(b"geheim");
    let keys = by_client("geheim", &stored, ChannelBinding::unsupported(), exchange(&stored, None)).unwrap();
    let login = Login::new(&keys, "client".into());
    let salt = BASE64.encode(&keys.salt);
    let (_, answered) = login.answer(format!("r=clientx,s={salt},i=4096").as_bytes()).unwrap();
    assert_eq!(answered.verify(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="), Err(LoginError::NotTheServer));
    for first in ["r=client,s=AAAA,i=4096", "r=clienX1,s=AAAA,i=4096", "s=AAAA,i=4096", "r=clientx,s=AAAA", "m=x"] {
        let login = Login::new(&keys, "client".into());
        assert!(matches!(login.answer(first.as_bytes()), Err(LoginError::Malformed(_))), "{first}");
    }
}

// === whatever comes ===

proptest! {
    #[test]
    fn no_first_message_panics_or_gets_in(message in prop::collection::vec(any::<u8>(), 0..200), plus: bool, tls: bool) {
        let mechanism = if plus { Mechanism::ScramPlus } else { Mechanism::Scram };
        let _ = exchange(PENCIL, tls.then_some(b"hash")).challenge(mechanism, &message).map(|(_, c)| c.check(&message).err());
    }

    /// Near misses: the words of the protocol in any order.
    #[test]
    fn no_sequence_of_the_protocols_words_gets_in(
        first in prop::collection::vec(prop::sample::select(vec!["n", "y", "p", ",", "=", "r", "c", "biws", "abc", "tls-server-end-point", "m", "a", "\0"]), 0..14),
        last in prop::collection::vec(prop::sample::select(vec!["c=biws", "c=eSws", ",", "r=abcours", "r=", "p=", "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=", "x=1", "v="]), 0..8),
    ) {
        for first in [first.concat(), "n,,n=,r=abc".to_owned()] {
            if let Ok((_, challenged)) = exchange(PENCIL, None).challenge(Mechanism::Scram, first.as_bytes()) {
                prop_assert!(challenged.check(last.concat().as_bytes()).is_err());
            }
        }
    }

    #[test]
    fn every_changed_bit_of_the_last_message_is_refused(at in 0..RFC7677_FINAL.len(), bit in 0u8..8) {
        let mut message = RFC7677_FINAL.to_vec();
        message[at] ^= 1 << bit;
        prop_assert!(rfc7677(PENCIL, false).1.check(&message).is_err());
    }

    #[test]
    fn whatever_a_backend_says_is_refused_in_words(message in ".{0,80}") {
        let stored: Verifier = PENCIL.parse().unwrap();
        let keys = Keys { client_key: Key::new([1; 32]), server_key: Key::new([2; 32]), salt: stored.salt, iterations: 4096 };
        let _ = Login::new(&keys, "client".into()).answer(message.as_bytes()).map(|(_, a)| a.verify(message.as_bytes()));
    }
}

proptest! {
    // Each makes keys from passwords, thousands of rounds each time.
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_password_proves_itself_and_no_other(password in ".{0,40}", other in "[a-z]{0,20}") {
        let stored = scram_sha_256(password.as_bytes());
        let get_in = |word: &str| by_client(word, &stored, ChannelBinding::unsupported(), exchange(&stored, None));
        let keys = get_in(&password).unwrap();
        prop_assert_eq!(log_in(&keys, &stored), Ok(()));
        // The marker keeps SASLprep from making them equal.
        prop_assert_eq!(get_in(&format!("{password}#{other}")).err(), Some(ScramError::Denied));
    }

    #[test]
    fn a_mock_exchange_is_always_denied(user in ".{1,20}", password in ".{1,20}") {
        let verifier = Verifier::mock(&MockSecret::derive(b"x"), &user, 4096);
        let exchange = Exchange { verifier, doomed: true, end_point: None, nonce: "ours".into() };
        let refused = by_client(&password, "SCRAM-SHA-256$", ChannelBinding::unsupported(), exchange);
        prop_assert_eq!(refused.err(), Some(ScramError::Denied));
    }
}
