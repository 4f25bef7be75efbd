//! TLS on the request and response planes: the real program in all its roles, certificates made
//! here.

mod lab;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use corelane::config::{TlsClient, TlsServer};
use corelane::tls::{kernel, material};
use corelane_codec::request_frame;
use lab::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedKey, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType,
};
use rustix::process::Signal;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, SignatureAlgorithm, StreamOwned,
    SupportedCipherSuite,
};

const LISTEN: &str = "dynamo/router/generate";
const TARGET: &str = "dynamo/backend/generate";

/// An authority.
fn authority(name: &str) -> CertifiedKey {
    let key_pair = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let cert = params.self_signed(&key_pair).unwrap();
    CertifiedKey { cert, key_pair }
}

/// A folder of certificates: `ca.pem`, `cert.pem`, `key.pem`.
struct Pki {
    folder: tempfile::TempDir,
}

impl Pki {
    fn new() -> Pki {
        let folder = tempfile::tempdir().unwrap();
        Pki::fill(folder.path());
        Pki { folder }
    }

    /// Writes files of a fresh authority; each appears at once.
    fn fill(folder: &Path) {
        let key_pair = KeyPair::generate().unwrap();
        // All of one name: one is told from another by its signatures.
        let ca = authority("tests");
        let mut params = CertificateParams::new(vec!["worker.test".to_owned()]).unwrap();
        let loopback = SanType::IpAddress([127, 0, 0, 1].into());
        params.subject_alt_names.push(loopback);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let cert = params.signed_by(&key_pair, &ca.cert, &ca.key_pair).unwrap();
        let files = [
            ("ca.pem", ca.cert.pem()),
            ("key.pem", key_pair.serialize_pem()),
            ("cert.pem", cert.pem()),
        ];
        for (name, text) in files {
            std::fs::write(folder.join("new"), text).unwrap();
            std::fs::rename(folder.join("new"), folder.join(name)).unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// `[tls]` of both sides.
    fn section(&self) -> String {
        let [ca, cert, key] = ["ca.pem", "cert.pem", "key.pem"].map(|name| self.text(name));
        format!("[tls]\ncert = \"{cert}\"\nkey = \"{key}\"\nca = \"{ca}\"\n")
    }
}

/// Dynamo's variables, for the roles that have no file.
struct Variables(Vec<(&'static str, String)>);

impl Variables {
    fn both_sides(pki: &Pki) -> Variables {
        Variables(vec![
            ("DYN_TCP_TLS_CERT_PATH", pki.text("cert.pem")),
            ("DYN_TCP_TLS_KEY_PATH", pki.text("key.pem")),
            ("DYN_TCP_TLS_CA_CERT_PATH", pki.text("ca.pem")),
        ])
    }

    fn and(mut self, name: &'static str, value: String) -> Variables {
        self.0.retain(|(known, _)| *known != name);
        self.0.push((name, value));
        self
    }

    fn pairs(&self) -> Vec<(&str, &str)> {
        self.0.iter().map(|(n, v)| (*n, v.as_str())).collect()
    }
}

/// An echo worker, and where it is called.
fn echo_worker(variables: &Variables) -> (Program, String) {
    let args = ["worker", "echo", "--endpoint", TARGET, "--items", "3"];
    let mut worker = Program::command_in(&args, &variables.pairs());
    let out = worker.says("\"ready\"");
    let ready: serde_json::Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
    let address = ready["address"].as_str().unwrap().to_owned();
    (worker, address)
}

/// Calls `address`; exit code and the caller.
fn call(address: &str, variables: &Variables, more: &[&str]) -> (i32, Program) {
    call_with("{\"text\":\"grüße\"}", address, variables, more)
}

fn call_with(body: &str, address: &str, variables: &Variables, more: &[&str]) -> (i32, Program) {
    let args = ["call", "--address", address, "--body", body];
    let mut call = Program::command_in(&[&args, more].concat(), &variables.pairs());
    (call.ended(), call)
}

fn instance(address: &str) -> String {
    format!("[[instance]]\nendpoint = \"{TARGET}\"\naddress = \"{address}\"\n")
}

fn route() -> String {
    format!("[[route]]\nlisten = \"{LISTEN}\"\ntarget = \"{TARGET}\"\n")
}

#[test]
fn a_call_is_encrypted_all_the_way_with_certificates_on_both_sides() {
    let pki = Pki::new();
    let mutual = Variables::both_sides(&pki)
        .and("DYN_TCP_TLS_CLIENT_CA_CERT_PATH", pki.text("ca.pem"))
        .and("DYN_TCP_TLS_CLIENT_CERT_PATH", pki.text("cert.pem"))
        .and("DYN_TCP_TLS_CLIENT_KEY_PATH", pki.text("key.pem"));
    let (worker, at) = echo_worker(&mutual);
    let (code, caller) = call(&at, &mutual, &["--count", "50", "--concurrency", "8"]);
    assert_eq!(code, 0, "{}", caller.log());
    assert_eq!(
        caller.out().matches("grüße").count(),
        150,
        "{}",
        caller.out()
    );

    // Many records.
    let long = format!("{{\"text\":\"{}\"}}", "ä".repeat(60_000));
    let (code, caller) = call_with(&long, &at, &mutual, &["--count", "5"]);
    assert_eq!(code, 0, "{}", caller.log());
    assert_eq!(caller.out().matches("ä").count(), 15 * 60_000);

    let text = [route(), instance(&at)].concat();
    let mut router = Program::serve(&text, &mutual.pairs());
    router.ready();
    let (address, path) = router.path(LISTEN);
    let through = format!("{address}/{path}");
    let (code, caller) = call(&through, &mutual, &["--count", "50", "--concurrency", "8"]);
    assert_eq!(code, 0, "{}", caller.log());
    assert!(router.metric(&["corelane_tls_handshakes_total", "accepted"]) >= 1.0);
    assert!(router.metric(&["corelane_tls_handshakes_total", "dialled"]) >= 1.0);
    assert_eq!(router.metric(&["corelane_tls_failures_total"]), 0.0);

    // Who has no certificate is refused by whom he calls; he himself asks for none.
    let nobody = Variables::both_sides(&pki);
    let (code, caller) = call(&at, &nobody, &["--timeout-ms", "20000"]);
    assert_eq!(code, 1, "{}", caller.out());
    let said = || worker.log().contains("no_certificate");
    wait_until("the worker says why", said);
    router.signal(Signal::TERM);
}

#[test]
fn a_certificate_of_an_unknown_authority_is_refused() {
    let (pki, other) = (Pki::new(), Pki::new());
    let (worker, at) = echo_worker(&Variables::both_sides(&pki));
    let stranger =
        Variables::both_sides(&pki).and("DYN_TCP_TLS_CA_CERT_PATH", other.text("ca.pem"));
    let (code, caller) = call(&at, &stranger, &["--timeout-ms", "20000"]);
    assert_eq!(code, 1, "{}", caller.out());
    assert!(
        caller.log().contains("unknown_authority"),
        "{}",
        caller.log()
    );
    wait_until("the worker hears of it", || {
        worker.log().contains("refused_by_peer")
    });

    // The name counts too, unless nothing does.
    let misnamed =
        Variables::both_sides(&pki).and("DYN_TCP_TLS_SERVER_NAME", "else.test".to_owned());
    let (code, caller) = call(&at, &misnamed, &["--timeout-ms", "20000"]);
    assert_eq!(code, 1, "{}", caller.out());
    assert!(caller.log().contains("bad_certificate"), "{}", caller.log());
    let named = misnamed.and("DYN_TCP_TLS_SERVER_NAME", "worker.test".to_owned());
    let (code, caller) = call(&at, &named, &[]);
    assert_eq!(code, 0, "{}", caller.log());
}

#[test]
fn who_speaks_the_other_language_is_told_apart() {
    let pki = Pki::new();
    let plain = Worker::start();
    let text = [route(), plain.instance(TARGET)].concat();
    let mut open = Program::serve(&text, &[]);
    open.ready();
    let (address, _) = open.path(LISTEN);
    assert!(
        greet(&pki, address).is_err(),
        "a plain router shakes no hands"
    );
    wait_until("it is counted", || {
        open.metric(&["corelane_tls_strangers_total"]) == 1.0
    });
    assert!(open.log().contains("speaks TLS where"), "{}", open.log());

    // A router that speaks TLS to those who connect to it, and not to its workers.
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| pki.text(name));
    let tls = format!("[tls]\ncert = \"{cert}\"\nkey = \"{key}\"\n");
    let mut closed = Program::serve(&[route(), plain.instance(TARGET), tls].concat(), &[]);
    closed.ready();
    let (mut caller, path) = closed.dial(LISTEN);
    caller.send(&path);
    let mut answer = Vec::new();
    // TLS's own word for "this is nothing", or just the end.
    let _ = caller.stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer[0] == 0x15, "{answer:?}");
    wait_until("it is counted", || {
        closed.metric(&["corelane_tls_failures_total", "accepted", "not_tls"]) == 1.0
    });
    let (address, path) = closed.path(LISTEN);
    let mut greeted = greet(&pki, address).unwrap();
    assert_eq!(ask(&mut greeted, &path), [0; 4]);
    wait_until("the worker has it", || plain.taken() == 1);
}

#[test]
fn changed_files_are_used_without_a_restart() {
    let pki = Pki::new();
    let plain = Worker::start();
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| pki.text(name));
    let tls = format!("[tls]\ncert = \"{cert}\"\nkey = \"{key}\"\n");
    let mut router = Program::serve(&[route(), plain.instance(TARGET), tls].concat(), &[]);
    router.ready();
    let (address, path) = router.path(LISTEN);
    let mut before = greet(&pki, address).unwrap();
    Pki::fill(pki.folder.path());
    wait_until("the new files are in use", || {
        router.metric(&["corelane_tls_reloads_total"]) >= 1.0 && greet(&pki, address).is_ok()
    });
    // A connection from before goes on.
    assert_eq!(ask(&mut before, &path), [0; 4]);
    std::fs::write(pki.path("cert.pem"), "no certificate").unwrap();
    wait_until("it is noticed", || {
        router.metric(&["corelane_tls_reload_failures_total"]) >= 1.0
    });
    assert!(router.log().contains("not taken over"), "{}", router.log());
    assert_eq!(ask(&mut greet(&pki, address).unwrap(), &path), [0; 4]);
}

type Greeted = StreamOwned<ClientConnection, TcpStream>;

/// A handshake of our own.
fn greet(pki: &Pki, address: SocketAddr) -> std::io::Result<Greeted> {
    let settings = TlsClient {
        ca: Some(pki.path("ca.pem")),
        identity: None,
        server_name: None,
    };
    greet_with(material::client(&settings).unwrap().config, address, b"")
}

/// A handshake with these settings; `along` leaves with our last word of it.
fn greet_with(
    config: Arc<ClientConfig>,
    address: SocketAddr,
    along: &[u8],
) -> std::io::Result<Greeted> {
    let name = ServerName::IpAddress(address.ip().into());
    let mut connection = ClientConnection::new(config, name).unwrap();
    connection.writer().write_all(along)?;
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = StreamOwned::new(connection, stream);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    stream.flush()?;
    Ok(stream)
}

/// The settings of a caller that shakes hands in one way only.
fn only(pki: &Pki, suite: SupportedCipherSuite) -> Arc<ClientConfig> {
    let provider = CryptoProvider {
        cipher_suites: vec![suite],
        ..ring::default_provider()
    };
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(pki.path("ca.pem")).unwrap();
    roots.add(ca).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[suite.version()])
        .unwrap();
    let builder = builder.with_root_certificates(roots);
    Arc::new(builder.with_no_client_auth())
}

/// A router with TLS before a worker without, and what is in `[tls]` besides.
fn router_before(plain: &Worker, pki: &Pki, more: &str) -> Program {
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| pki.text(name));
    let tls = format!("[tls]\ncert = \"{cert}\"\nkey = \"{key}\"\n{more}");
    Program::serve(&[route(), plain.instance(TARGET), tls].concat(), &[])
}

fn encrypted_by(router: &Program, mode: &str) -> f64 {
    router.metric(&["corelane_tls_connections_total", mode])
}

#[test]
fn who_encrypts_can_be_chosen_and_is_told() {
    let (pki, plain) = (Pki::new(), Worker::start());
    let mut off = router_before(&plain, &pki, "kernel = \"off\"\n");
    off.ready();
    let (address, path) = off.path(LISTEN);
    assert_eq!(ask(&mut greet(&pki, address).unwrap(), &path), [0; 4]);
    assert_eq!(encrypted_by(&off, "user"), 1.0);
    assert_eq!(encrypted_by(&off, "kernel"), 0.0);
    assert!(off.log().contains("threads of this process encrypt"));

    let can = kernel::look();
    let mut required = router_before(&plain, &pki, "kernel = \"required\"\n");
    if let Err(why) = can {
        assert!(std::env::var_os("CORELANE_VM").is_none(), "{why}");
        assert_eq!(required.ended(), 78, "{}", required.log());
        let says = required.log().contains(&why.to_string());
        assert!(says, "{}", required.log());
        // Nobody has asked for more than can be had.
        let mut auto = router_before(&plain, &pki, "");
        auto.ready();
        let (address, path) = auto.path(LISTEN);
        assert_eq!(ask(&mut greet(&pki, address).unwrap(), &path), [0; 4]);
        assert_eq!(encrypted_by(&auto, "user"), 1.0);
        assert!(auto.log().contains(&why.to_string()), "{}", auto.log());
        return;
    }
    required.ready();
    let (address, path) = required.path(LISTEN);
    assert_eq!(ask(&mut greet(&pki, address).unwrap(), &path), [0; 4]);
    assert_eq!(encrypted_by(&required, "kernel"), 1.0);
    assert_eq!(required.metric(&["corelane_tls_pumped"]), 0.0);
}

#[test]
fn every_cipher_suite_carries_what_comes_along_with_the_handshake() {
    let (pki, plain) = (Pki::new(), Worker::start());
    let mut router = router_before(&plain, &pki, "");
    router.ready();
    let (address, path) = router.path(LISTEN);
    let suites = ring::default_provider().cipher_suites;
    let certificate = SignatureAlgorithm::ECDSA;
    let usable = suites
        .into_iter()
        .filter(|suite| suite.usable_for_signature_algorithm(certificate));
    let mut asked = 0;
    for suite in usable {
        let mut greeted = greet_with(only(&pki, suite), address, &frame(&path)).unwrap();
        let mut reply = [1; 4];
        greeted.read_exact(&mut reply).unwrap();
        assert_eq!(reply, [0; 4], "{suite:?}");
        for _ in 0..3 {
            assert_eq!(ask(&mut greeted, &path), [0; 4], "{suite:?}");
        }
        asked += 4;
    }
    assert!(asked >= 6 * 4);
    wait_until("the worker has all", || plain.taken() == asked);
    let kernel = f64::from(u8::from(kernel::look().is_ok()));
    let connections = (asked / 4) as f64;
    assert_eq!(encrypted_by(&router, "kernel"), connections * kernel);
    assert_eq!(encrypted_by(&router, "user"), connections * (1.0 - kernel));
}

#[test]
fn ends_are_told_and_taken_with_tls_own_farewell_or_without() {
    let (pki, plain) = (Pki::new(), Worker::start());
    let mut router = router_before(&plain, &pki, "");
    router.ready();
    let (address, path) = router.path(LISTEN);
    for farewell in [true, false] {
        let mut greeted = greet(&pki, address).unwrap();
        assert_eq!(ask(&mut greeted, &path), [0; 4]);
        match farewell {
            true => {
                // The connection itself stays open.
                greeted.conn.send_close_notify();
                greeted.flush().unwrap();
            }
            false => greeted.sock.shutdown(Shutdown::Write).unwrap(),
        }
        // An end without a farewell would be an error here.
        assert_eq!(greeted.read(&mut [0]).unwrap(), 0, "{farewell}");
    }
    // The farewell of a router that stops.
    let mut greeted = greet(&pki, address).unwrap();
    assert_eq!(ask(&mut greeted, &path), [0; 4]);
    wait_until("the others are gone", || {
        router.metric(&["corelane_connections_closed_total"]) >= 2.0
    });
    assert_eq!(router.metric(&["corelane_tls_farewells_lost_total"]), 0.0);
}

#[test]
fn new_keys_are_taken_or_refused_by_name() {
    let (pki, plain) = (Pki::new(), Worker::start());
    let mut router = router_before(&plain, &pki, "");
    router.ready();
    let (address, path) = router.path(LISTEN);
    let mut greeted = greet(&pki, address).unwrap();
    assert_eq!(ask(&mut greeted, &path), [0; 4]);
    greeted.conn.refresh_traffic_keys().unwrap();
    if encrypted_by(&router, "user") == 1.0 {
        assert_eq!(ask(&mut greeted, &path), [0; 4]);
        return;
    }
    greeted.flush().unwrap();
    assert_eq!(greeted.read(&mut [0]).unwrap(), 0);
    assert_eq!(
        router.metric(&["corelane_tls_key_updates_refused_total"]),
        1.0
    );
}

fn ask(stream: &mut Greeted, path: &str) -> [u8; 4] {
    stream.write_all(&frame(path)).unwrap();
    let mut reply = [1; 4];
    stream.read_exact(&mut reply).unwrap();
    reply
}

#[test]
fn files_of_no_use_are_named() {
    let (pki, other) = (Pki::new(), Pki::new());
    let server = |cert: PathBuf, key: PathBuf| {
        let client_ca = None;
        material::server(&TlsServer {
            cert,
            key,
            client_ca,
        })
        .map(|_| ())
    };
    assert_eq!(server(pki.path("cert.pem"), pki.path("key.pem")), Ok(()));
    let wrong = server(pki.path("cert.pem"), other.path("key.pem")).unwrap_err();
    assert_eq!(wrong.path, other.path("key.pem"));
    assert!(
        wrong
            .why
            .starts_with("is not the key of the certificate in"),
        "{wrong}"
    );
    let wrong = server(pki.path("key.pem"), pki.path("key.pem")).unwrap_err();
    assert_eq!(wrong.why, "has no certificate in it");
    let wrong = server(pki.path("nothing"), pki.path("key.pem")).unwrap_err();
    assert_eq!(wrong.why, "does not exist");

    let text = [
        route(),
        format!("[tls]\ncert = \"{}\"\n", pki.text("cert.pem")),
    ]
    .concat();
    let mut refused = Program::serve(&text, &[]);
    assert_eq!(refused.ended(), 2);
    assert!(
        refused.log().contains("cert without key"),
        "{}",
        refused.log()
    );
    let text = [route(), pki.section().replace("ca.pem", "no.pem")].concat();
    let mut refused = Program::serve(&text, &[]);
    assert_eq!(refused.ended(), 2);
    assert!(
        refused.log().contains("ca does not exist"),
        "{}",
        refused.log()
    );
}

/// What all threads of a process have used up so far, in ns.
fn cpu_ns(process: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let of_task = |task: PathBuf| {
        let text = std::fs::read_to_string(task.join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    };
    tasks.filter_map(|task| of_task(task.unwrap().path())).sum()
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// Prints what a request costs its router, without TLS, with it in threads and in the kernel:
/// `scripts/vm-test` runs it where there is a kernel that has it.
#[test]
#[ignore = "a measurement"]
fn what_encryption_costs() {
    const ROUNDS: usize = 9;
    let (pki, plain) = (Pki::new(), Worker::start());
    let mut ways = Vec::new();
    for way in ["none", "off", "required"] {
        let mut router = match way {
            "none" => Program::serve(&[route(), plain.instance(TARGET)].concat(), &[]),
            way => router_before(&plain, &pki, &format!("kernel = \"{way}\"\n")),
        };
        router.ready();
        let (address, path) = router.path(LISTEN);
        let stream: Box<dyn Stream> = match way {
            "none" => Box::new(router.dial(LISTEN).0.stream),
            _ => Box::new(greet(&pki, address).unwrap()),
        };
        ways.push((way, router, stream, path));
    }
    for (body_bytes, count) in [(4 << 10, 4096), (1 << 20, 128)] {
        let mut costs = vec![Vec::new(); ways.len()];
        for round in 0..=ROUNDS {
            for ((_, router, stream, path), costs) in ways.iter_mut().zip(&mut costs) {
                let mut frame = Vec::new();
                let body = vec![b'x'; body_bytes];
                let headers = b"{\"request-id\":\"r\"}";
                request_frame::write_frame(path.as_bytes(), headers, &body, &mut frame).unwrap();
                let before = cpu_ns(router.child.id());
                for _ in 0..count {
                    stream.write_all(&frame).unwrap();
                    let mut reply = [1; 4];
                    stream.read_exact(&mut reply).unwrap();
                    assert_eq!(reply, [0; 4]);
                }
                let spent = cpu_ns(router.child.id()) - before;
                // The first round warms up.
                if round > 0 {
                    costs.push(spent as f64 / f64::from(count) / 1e3);
                }
                plain.forget();
            }
        }
        for ((way, ..), costs) in ways.iter().zip(&mut costs) {
            costs.sort_by(f64::total_cmp);
            let (low, high) = (costs[0], costs[ROUNDS - 1]);
            let median = costs[ROUNDS / 2];
            println!("{body_bytes} bytes, kernel {way}: {median:.1} us ({low:.1} to {high:.1})");
        }
    }
}
