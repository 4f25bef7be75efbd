//! Who is let in by a NATS server, and over what: each kind of authentication against a server
//! that asks for it, and TLS with an authority of the test's own (spec/events-discovery.md §6).

use std::path::Path;
use std::time::Duration;

use crate::lab::{NatsServer, run};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use corelane::nats::{Nats, NatsAuth, NatsError, NatsOptions, NatsTls};
use nkeys::KeyPair;
use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, KeyPair as TlsKey};
use serde_json::{Value, json};

/// Connects and has a message go round.
async fn enters(options: &NatsOptions) -> Result<(), NatsError> {
    let nats = Nats::connect(options).await?;
    let client = nats.client();
    let mut inbox = client.subscribe("there").await.unwrap();
    client.publish("there", "and back".into()).await.unwrap();
    let message = futures_util::StreamExt::next(&mut inbox).await.unwrap();
    assert_eq!(message.payload, "and back");
    nats.close().await;
    Ok(())
}

fn with(server: &NatsServer, auth: NatsAuth) -> NatsOptions {
    NatsOptions {
        auth,
        ..server.options()
    }
}

fn user(name: &str, password: &str) -> NatsAuth {
    NatsAuth::User {
        name: name.to_owned(),
        password: password.to_owned(),
    }
}

fn server(configuration: &str) -> NatsServer {
    NatsServer::configured(tempfile::tempdir().unwrap(), configuration)
}

/// Refused at once, not tried for two minutes, and it says where to look.
async fn refused(options: &NatsOptions) {
    let Err(NatsError::Unreachable { waited, advice, .. }) = enters(options).await else {
        panic!("let in, or another error");
    };
    assert!(waited < options.startup_max / 2, "{waited:?}");
    assert_eq!(advice, "check NATS_AUTH_*");
}

#[test]
fn user_and_password() {
    let server = server("authorization { user: alice, password: secret }");
    run(async {
        enters(&with(&server, user("alice", "secret")))
            .await
            .unwrap();
        refused(&with(&server, user("alice", "guess"))).await;
        refused(&server.options()).await;
    });
}

#[test]
fn the_default_pair_is_sent_where_nothing_is_set() {
    let asks = server("authorization { user: user, password: user }");
    let open = server("");
    run(async {
        enters(&asks.options()).await.unwrap();
        enters(&open.options()).await.unwrap();
    });
}

#[test]
fn token() {
    let server = server("authorization { token: t0ken }");
    run(async {
        enters(&with(&server, NatsAuth::Token("t0ken".into())))
            .await
            .unwrap();
        refused(&with(&server, NatsAuth::Token("other".into()))).await;
    });
}

#[test]
fn nkey() {
    let (key, other) = (KeyPair::new_user(), KeyPair::new_user());
    let public = key.public_key();
    let server = server(&format!(
        "authorization {{ users: [ {{ nkey: {public} }} ] }}"
    ));
    run(async {
        let seed = NatsAuth::Nkey(key.seed().unwrap());
        enters(&with(&server, seed)).await.unwrap();
        refused(&with(&server, NatsAuth::Nkey(other.seed().unwrap()))).await;
    });
}

/// A JSON web token as nats-server checks it.
fn token_of(issuer: &KeyPair, subject: &KeyPair, name: &str, mut nats: Value) -> String {
    nats["version"] = json!(2);
    let claims = json!({
        "jti": name, "iat": 1_700_000_000, "iss": issuer.public_key(), "name": name,
        "sub": subject.public_key(), "nats": nats,
    });
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let head = part(&json!({"typ": "JWT", "alg": "ed25519-nkey"}));
    let signed = format!("{head}.{}", part(&claims));
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

#[test]
fn credentials_file() {
    let (operator, account, user) = (
        KeyPair::new_operator(),
        KeyPair::new_account(),
        KeyPair::new_user(),
    );
    let limits = json!({
        "subs": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1, "data": -1,
        "payload": -1, "wildcards": true,
    });
    let of_operator = token_of(&operator, &operator, "o", json!({"type": "operator"}));
    let of_account = json!({"type": "account", "limits": limits});
    let of_account = token_of(&operator, &account, "a", of_account);
    let of_user = json!({
        "type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1,
    });
    let of_user = token_of(&account, &user, "u", of_user);
    let public = account.public_key();
    let server = server(&format!(
        "operator: {of_operator}\nresolver: MEMORY\n\
         resolver_preload: {{ {public}: {of_account} }}\n"
    ));
    let seed = user.seed().unwrap();
    let credentials = format!(
        "-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    );
    let path = server.path("user.creds");
    std::fs::write(&path, credentials).unwrap();
    run(async {
        enters(&with(&server, NatsAuth::Credentials(path)))
            .await
            .unwrap();
        refused(&server.options()).await;
        let missing = with(&server, NatsAuth::Credentials(server.path("missing")));
        let error = enters(&missing).await.unwrap_err().to_string();
        assert!(error.contains("NATS_AUTH_CREDENTIALS_FILE"), "{error}");
    });
}

struct Authority {
    certificate: Certificate,
    key: TlsKey,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Authority {
        let key = TlsKey::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.join(name), certificate.pem()).unwrap();
        Authority { certificate, key }
    }

    fn issue(&self, folder: &Path, name: &str) {
        let key = TlsKey::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params
            .signed_by(&key, &self.certificate, &self.key)
            .unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

fn tls_server(verify: bool) -> NatsServer {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca.pem");
    Authority::new(folder.path(), "other.pem");
    authority.issue(folder.path(), "server");
    authority.issue(folder.path(), "client");
    let configuration = format!(
        "tls {{ cert_file: server.pem, key_file: server.key, ca_file: ca.pem, verify: {verify} }}"
    );
    NatsServer::configured(folder, &configuration)
}

fn with_tls(server: &NatsServer, tls: NatsTls) -> NatsOptions {
    NatsOptions {
        tls,
        ..NatsOptions::server(server.url("tls"))
    }
}

#[test]
fn tls_with_an_authority_of_ones_own() {
    let server = tls_server(false);
    run(async {
        let ca = |name: &str| NatsTls {
            ca: Some(server.path(name)),
            ..NatsTls::default()
        };
        enters(&with_tls(&server, ca("ca.pem"))).await.unwrap();
        let insecure = NatsTls {
            insecure: true,
            ..NatsTls::default()
        };
        enters(&with_tls(&server, insecure)).await.unwrap();
        // Somebody else's authority, and the host's own, do not know this server.
        for tls in [ca("other.pem"), NatsTls::default()] {
            let mut options = with_tls(&server, tls);
            options.startup_max = Duration::ZERO;
            enters(&options).await.unwrap_err();
        }
        let error = enters(&with_tls(&server, ca("missing.pem")))
            .await
            .unwrap_err();
        assert!(matches!(error, NatsError::File(_)), "{error}");
    });
}

#[test]
fn client_certificates() {
    let server = tls_server(true);
    run(async {
        let identity = Some((server.path("client.pem"), server.path("client.key")));
        let ca = Some(server.path("ca.pem"));
        let both = NatsTls {
            ca: ca.clone(),
            identity: identity.clone(),
            insecure: false,
        };
        enters(&with_tls(&server, both)).await.unwrap();
        let insecure = NatsTls {
            ca: None,
            identity,
            insecure: true,
        };
        enters(&with_tls(&server, insecure)).await.unwrap();
        let without = NatsTls {
            ca,
            ..NatsTls::default()
        };
        let mut options = with_tls(&server, without);
        options.startup_max = Duration::ZERO;
        enters(&options).await.unwrap_err();
    });
}

#[test]
fn a_server_that_is_not_there_yet_is_waited_for() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    drop(listener);
    run(async {
        let mut options = NatsOptions::server(url);
        options.startup_max = Duration::from_secs(2);
        let Err(NatsError::Unreachable { waited, server, .. }) = enters(&options).await else {
            panic!("nobody is there");
        };
        assert!(
            waited >= Duration::from_secs(1),
            "tried again after a second: {waited:?}"
        );
        assert_eq!(server, options.server);
    });
}
