//! Discovery against an etcd that speaks TLS and asks for client certificates. Skipped, with a
//! line that says so, where there is no etcd or no openssl to make certificates with.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use corelane::discovery::{Discovery, EtcdAuth, EtcdDiscovery, EtcdOptions, Record, Registered};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::path::EndpointId;
use tokio::task::LocalSet;

const EXTENSIONS: &str = "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n";

/// Runs a quiet command in `folder`; None when there is no such program.
fn command(program: &str, folder: &Path, arguments: &[&str]) -> Option<Child> {
    let spawned = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match spawned {
        Ok(child) => Some(child),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("skipped: there is no {program} on the path");
            None
        }
        Err(error) => panic!("{program} does not start: {error}"),
    }
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

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn start_etcd(folder: &Path, port: u16) -> Option<Ends> {
    let client = format!("https://127.0.0.1:{port}");
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
        ["--cert-file", "server.pem"],
        ["--key-file", "server.key"],
        ["--trusted-ca-file", "ca.pem"],
    ];
    let mut arguments = arguments.concat();
    arguments.push("--client-cert-auth");
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
    let ready = make_certificates(folder.path()).and_then(|()| start_etcd(folder.path(), port));
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
