//! Discovery against an etcd that does not let everybody in: one that speaks TLS and asks for
//! client certificates, and one that asks for a password. Skipped, with a
//! line that says so, where there is no etcd or no openssl to make certificates with.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use corelane::discovery::{Discovery, EtcdAuth, EtcdDiscovery, EtcdOptions, Record, Registered};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::path::EndpointId;
use tokio::task::LocalSet;

mod common;
#[path = "ports/mod.rs"]
mod ports;

use ports::free_port;

const EXTENSIONS: &str = "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n";

/// Runs a quiet command in `folder`; None when there is no such program.
fn command(program: &str, folder: &Path, arguments: &[&str]) -> Option<Child> {
    common::if_there(Command::new(program).args(arguments).current_dir(folder))
}

/// An authority and two certificates of it.
fn make_certificates(folder: &Path) -> Option<()> {
    std::fs::write(folder.join("extensions"), EXTENSIONS).unwrap();
    let run = |line: &str| {
        let arguments: Vec<&str> = line.split(' ').collect();
        let done = command("openssl", folder, &arguments)?.wait().unwrap();
        assert!(done.success(), "openssl {line}");
        Some(())
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    run(&format!(
        "req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=authority"
    ))?;
    for name in ["server", "client"] {
        run(&format!(
            "req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ))?;
        run(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
             -extfile extensions -out {name}.pem"
        ))?;
    }
    Some(())
}

/// Ends with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_etcd(folder: &Path, scheme: &str, port: u16, more: &[&str]) -> Option<Ends> {
    let client = format!("{scheme}://127.0.0.1:{port}");
    let peer = format!("http://127.0.0.1:{}", free_port());
    let cluster = format!("test={peer}");
    let arguments = [
        ["--name", "test"],
        ["--data-dir", "data"],
        ["--listen-client-urls", &client],
        ["--advertise-client-urls", &client],
        ["--listen-peer-urls", &peer],
        ["--initial-advertise-peer-urls", &peer],
        ["--initial-cluster", &cluster],
    ];
    let arguments = [&arguments.concat(), more].concat();
    command("etcd", folder, &arguments).map(Ends)
}

async fn works(options: EtcdOptions) -> bool {
    let Ok(etcd) = EtcdDiscovery::connect(options).await else {
        return false;
    };
    let discovery = Discovery::Etcd(etcd);
    let endpoint = EndpointId::new("demo", "backend", "generate");
    let address = "127.0.0.1:1".parse().unwrap();
    let record = Record::instance(&endpoint, address, PayloadCodec::Json);
    let registered = discovery.register(record).await.unwrap();
    discovery.close().await;
    registered == Registered::Stored
}

#[test]
fn certificates_open_what_is_closed_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let tls = "--cert-file server.pem --key-file server.key --trusted-ca-file ca.pem \
               --client-cert-auth";
    let tls: Vec<&str> = tls.split(' ').filter(|word| !word.is_empty()).collect();
    let start = || start_etcd(folder.path(), "https", port, &tls);
    let ready = make_certificates(folder.path()).and_then(|()| start());
    let Some(_etcd) = ready else { return };
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = |name: &str| std::fs::read_to_string(path(name)).unwrap();
    // One as a path, the others as text; the endpoint without a scheme.
    let options = EtcdOptions::from_env(|name| match name {
        "ETCD_ENDPOINTS" => Some(format!("127.0.0.1:{port}")),
        "ETCD_AUTH_CA" => Some(path("ca.pem")),
        "ETCD_AUTH_CLIENT_CERT" => Some(text("client.pem")),
        "ETCD_AUTH_CLIENT_KEY" => Some(text("client.key")),
        _ => None,
    })
    .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        assert!(works(options.clone()).await, "with our certificate");
        let EtcdAuth::Tls { authority_pem, .. } = options.auth.clone() else {
            panic!("not TLS")
        };
        let nameless = EtcdOptions {
            auth: EtcdAuth::Tls {
                authority_pem,
                identity_pem: None,
            },
            startup_timeout: Duration::from_secs(2),
            ..options
        };
        assert!(!works(nameless).await, "without one");
    });
}

/// From now on only `root` with this password, who has all rights.
async fn demand_password(port: u16, password: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut client = loop {
        let endpoint = format!("127.0.0.1:{port}");
        if let Ok(mut client) = etcd_client::Client::connect([endpoint], None).await
            && client.status().await.is_ok()
        {
            break client;
        }
        assert!(Instant::now() < deadline, "etcd does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    client.role_add("root").await.unwrap();
    client.user_add("root", password, None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.auth_enable().await.unwrap();
}

#[test]
fn a_password_opens_what_is_closed_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let Some(_etcd) = start_etcd(folder.path(), "http", port, &[]) else {
        return;
    };
    let with = |password: Option<&'static str>| {
        let mut options = EtcdOptions::from_env(|name| match name {
            "ETCD_ENDPOINTS" => Some(format!("http://127.0.0.1:{port}")),
            "ETCD_AUTH_USERNAME" => Some("root".to_owned()),
            "ETCD_AUTH_PASSWORD" => password.map(str::to_owned),
            _ => None,
        })
        .unwrap();
        if password != Some("right") {
            options.startup_timeout = Duration::from_secs(2);
        }
        options
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        demand_password(port, "right").await;
        assert!(works(with(Some("right"))).await, "with the password");
        assert!(!works(with(Some("wrong"))).await, "with another");
        assert!(!works(with(None)).await, "without one");
    });
}
