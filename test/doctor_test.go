package test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/pkg/doctor"
	"github.com/hallmark-id/hallmark/test/harness"
)

// patient is an installation that "hallmark doctor" examines, as root.
type patient struct {
	*harness.Domain
	env []string
}

// healthy is one with nothing wrong: server and agent run, and root's processes
// have an identity.
func healthy(t *testing.T, s harness.Settings) *patient {
	t.Helper()
	p := &patient{Domain: harness.NewDomain(t, s)}
	p.StartServer(t)
	p.StartAgent(t, p.Join(t))
	p.Entry(t, "/operator", 0)
	p.Entry(t, "/served", 1)
	harness.Eventually(t, "the operator's identity", func(context.Context) error {
		_, stderr, code := harness.Command{Args: []string{"fetch", "x509", "--socket", p.Socket}}.Try(t)
		if code != 0 {
			return errors.New(stderr)
		}
		return nil
	})
	return p
}

// examine runs the command and returns what it found, and its exit status.
func (p *patient) examine(t *testing.T) (findings, int) {
	t.Helper()
	c := harness.Command{Env: p.env, Args: []string{"doctor", "-o", "json",
		"-c", filepath.Join(p.Dir, "server.yaml"), "-c", filepath.Join(p.Dir, "agent.yaml")}}
	out, stderr, code := c.Try(t)
	var x struct{ Findings findings }
	if err := json.Unmarshal([]byte(out), &x); err != nil {
		t.Fatalf("%v\n%s%s", err, out, stderr)
	}
	return x.Findings, code
}

type findings []doctor.Finding

// expect fails the test unless there is a finding whose message, and whose
// remedy, have these words.
func (fs findings) expect(t *testing.T, part, check string, s doctor.Status, message, remedy string) {
	t.Helper()
	for _, f := range fs {
		if f.Part == part && f.Check == check && f.Status == s && strings.Contains(f.Message, message) && strings.Contains(f.Remedy, remedy) {
			return
		}
	}
	t.Errorf("nothing is said of %s, %s: %s %q → %q, but\n%s", part, check, s, message, remedy, fs)
}

func (fs findings) String() string {
	var b strings.Builder
	for _, f := range fs {
		fmt.Fprintf(&b, "%s, %s: %s %q → %q\n", f.Part, f.Check, f.Status, f.Message, f.Remedy)
	}
	return b.String()
}

// allFine fails the test if there is anything to complain of.
func (fs findings) allFine(t *testing.T) {
	t.Helper()
	for _, f := range fs {
		if f.Status == doctor.Warning || f.Status == doctor.Failed {
			t.Errorf("something is wrong:\n%s", fs)
			return
		}
	}
}

func TestDoctorFindsNothingWrongWithAHealthyInstallation(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	found, code := p.examine(t)
	found.allFine(t)
	if code != 0 {
		t.Errorf("exit status %d", code)
	}
	for _, want := range []struct{ part, check, message string }{
		{"server", "configuration", "server.yaml is valid"},
		{"server", "data directory", "mode 0700"},
		{"server", "socket", "mode 0600, of user 61001"},
		{"server", "file descriptors", "15000 connections need 15256"},
		{"server", "status", "serves example.org"},
		{"server", "server certificate", "spiffe://example.org/spire/server"},
		{"server", "authorities", "x509 of server main"},
		{"server", "authorities", "jwt of server main"},
		{"server", "agents", "1, 1 of them connected"},
		{"agent", "configuration", "agent.yaml is valid"},
		{"agent", "disk", "left"},
		{"agent", "identity", "spiffe://example.org/spire/agent/join_token/"},
		{"agent", "in step", "with " + p.Address},
		{"agent", "connection", p.Address + " answers"},
		{"agent", "server certificate", "spiffe://example.org/spire/server"},
		{"agent", "clock", "apart from the server's"},
		{"workload", "socket", "mode 0777"},
		{"workload", "identity", "this process is spiffe://example.org/operator"},
	} {
		found.expect(t, want.part, want.check, doctor.OK, want.message, "")
	}

	// Whoever is neither root nor of the program is told what was not looked at.
	out, _, code := harness.Command{UID: 61003, Args: []string{"doctor", "-c", filepath.Join(p.Dir, "agent.yaml")}}.Try(t)
	if code != 0 || !strings.Contains(out, "- socket") || !strings.Contains(out, "run this as one of them") {
		t.Errorf("as another user: exit status %d\n%s", code, out)
	}
}

func TestDoctorFindsAServerThatIsDown(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	p.Server.Stop(t)
	found, code := p.examine(t)
	if code != 1 {
		t.Errorf("exit status %d", code)
	}
	found.expect(t, "server", "socket", doctor.Failed, "no server runs", "Start the server")
	found.expect(t, "agent", "in step", doctor.Failed, "not in step with "+p.Address, "")
	found.expect(t, "agent", "identity", doctor.Warning, "ends in", "back in step before that")
	found.expect(t, "agent", "connection", doctor.Failed, "no server at "+p.Address, "open the port in firewalls")
	found.expect(t, "workload", "identity", doctor.OK, "/operator", "")
}

func TestDoctorFindsAnAgentThatIsDown(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	p.Agent.Stop(t)
	found, _ := p.examine(t)
	found.expect(t, "agent", "socket", doctor.Failed, "no agent runs", "Start the agent")
	found.expect(t, "workload", "socket", doctor.Failed, "no agent runs", "Start the agent")
	// Whether it would get on with its server is known nevertheless.
	found.expect(t, "agent", "server certificate", doctor.OK, "spiffe://example.org/spire/server", "")
}

func TestDoctorFindsTheSocketOfAnAgentThatWasKilled(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	p.Agent.Kill()
	found, _ := p.examine(t)
	found.expect(t, "agent", "socket", doctor.Failed, "nobody listens on "+p.AgentSocket, "Start the agent")
	found.expect(t, "workload", "socket", doctor.Failed, "nobody listens on "+p.Socket, "Start the agent")
}

func TestDoctorFindsWrongModesAndOwners(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	keys := filepath.Join(p.Dir, "server", "data", "keys")
	store := filepath.Join(p.Dir, "server", "data", "store")
	if err := os.Chown(store, 0, 0); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{p.AdminSocket: 0o666, p.Socket: 0o700, keys: 0o755, filepath.Join(p.Dir, "agent", "data"): 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	found, _ := p.examine(t)
	found.expect(t, "server", "socket", doctor.Failed, "has mode 0666; it should be 0600", "chmod 0600 "+p.AdminSocket)
	found.expect(t, "workload", "socket", doctor.Failed, "has mode 0700; it should be 0777", "chmod 0777 "+p.Socket)
	found.expect(t, "server", "data directory", doctor.Warning, "mode 0755", "chmod 0700 "+keys)
	found.expect(t, "agent", "data directory", doctor.Failed, "mode 0777", "chmod 0700")
	found.expect(t, "server", "data directory", doctor.Failed, store+" is of root, but the program runs as user 61001", "chown -R 61001 "+store)
	// The remedies are.
	for _, f := range found {
		if command, ok := strings.CutPrefix(f.Remedy, "chmod "); ok {
			mode, path, _ := strings.Cut(command, " ")
			var bits os.FileMode
			fmt.Sscanf(mode, "%o", &bits)
			if err := os.Chmod(path, bits); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Chown(store, harness.ServerUID, harness.ServerUID); err != nil {
		t.Fatal(err)
	}
	found, _ = p.examine(t)
	found.allFine(t)
}

func TestDoctorFindsATrustBundleOfAnotherServer(t *testing.T) {
	t.Parallel()
	p := &patient{Domain: harness.NewDomain(t, harness.Settings{
		Agent: "trust_bundle: ${TRUST}\nnode_attestor: {join_token: {token: b7d6f1a0-0000-4000-8000-000000000000}}\n"})}
	trust := filepath.Join(p.Dir, "other.pem")
	p.env = []string{"TRUST=" + trust}
	writeAuthority(t, trust, "example.org", time.Hour)
	p.StartServer(t)
	agent := harness.Command{Env: p.env, UID: harness.AgentUID, Args: []string{"agent", "run", "-c", filepath.Join(p.Dir, "agent.yaml")}}
	if _, stderr, code := agent.Try(t); code == 0 || !strings.Contains(stderr, "not to be trusted") {
		t.Fatalf("the agent takes the server for the right one: %s", stderr)
	}
	found, _ := p.examine(t)
	found.expect(t, "agent", "connection", doctor.OK, "answers", "")
	found.expect(t, "agent", "server certificate", doctor.Failed, "does not vouch for the server at "+p.Address, "hallmark bundle show")
	found.expect(t, "server", "server certificate", doctor.OK, "spiffe://example.org/spire/server", "")

	// With the right one, the remedy, it does.
	if err := os.WriteFile(trust, []byte(p.Admin(t, "bundle", "show", "-o", "pem")), 0o644); err != nil {
		t.Fatal(err)
	}
	found, _ = p.examine(t)
	found.expect(t, "agent", "server certificate", doctor.OK, "spiffe://example.org/spire/server", "")
}

// writeAuthority writes the certificate of an authority that nobody has.
func writeAuthority(t *testing.T, path, trustDomain string, life time.Duration) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	if err == nil {
		err = os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestDoctorFindsANodeWhoseSVIDHasExpired(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{Server: "x509: {agent_lifetime: 8s}\n"})
	p.Server.Stop(t)
	harness.Eventually(t, "the node's SVID has ended", func(context.Context) error {
		found, _ := p.examine(t)
		for _, f := range found {
			if f.Part == "agent" && f.Check == "identity" && f.Status == doctor.Failed {
				return nil
			}
		}
		return errors.New(found.String())
	})
	found, _ := p.examine(t)
	found.expect(t, "agent", "identity", doctor.Failed, "/spire/agent/join_token/", "hallmark token generate")
	found.expect(t, "agent", "identity", doctor.Failed, "ended ", "")
	p.StartServer(t)
	found, _ = p.examine(t)
	found.expect(t, "server", "agents", doctor.Warning, "cannot come back by themselves", "new join string")
}

func TestDoctorFindsAMistakeInTheConfiguration(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	for name, text := range map[string]string{"server.yaml": "trust_domain: example.org\ndatadir: /x\n", "agent.yaml": "trust_domain: example.org\nserver: nowhere\n"} {
		if err := os.WriteFile(filepath.Join(p.Dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	found, _ := p.examine(t)
	found.expect(t, "server", "configuration", doctor.Failed, "server.yaml:2:1: unknown key `datadir`, did you mean `data_dir`", "hallmark server validate -c")
	found.expect(t, "agent", "configuration", doctor.Failed, "is not host:port", "hallmark agent validate -c")
}

func TestDoctorFindsAnAgentThatWasBanned(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	id := p.agentID(t)
	p.Admin(t, "node", "ban", "--yes", id)
	<-p.Agent.Done()
	found, _ := p.examine(t)
	found.expect(t, "server", "agents", doctor.Warning, id+" may not come back: banned", "hallmark node evict")
	found.expect(t, "agent", "socket", doctor.Failed, "no agent runs", "its log says why")
}

func (p *patient) agentID(t *testing.T) string {
	t.Helper()
	var nodes []struct{ ID string }
	if err := json.Unmarshal([]byte(p.Admin(t, "node", "list", "-o", "json")), &nodes); err != nil || len(nodes) != 1 {
		t.Fatalf("%d nodes: %v", len(nodes), err)
	}
	return nodes[0].ID
}

func TestDoctorSaysWhyItsCallerHasNoIdentity(t *testing.T) {
	t.Parallel()
	p := &patient{Domain: harness.NewDomain(t, harness.Settings{})}
	p.StartServer(t)
	p.StartAgent(t, p.Join(t))
	found, code := p.examine(t)
	found.expect(t, "workload", "identity", doctor.Warning, "this process gets none: this node has no entries", "hallmark entry create")
	if code != 0 {
		t.Errorf("exit status %d, though all works", code)
	}
	p.Entry(t, "/near", 0, "--selector", "unix:gid:77")
	p.Entry(t, "/far", 1, "--selector", "unix:gid:77")
	harness.Eventually(t, "the entries are there", func(context.Context) error {
		found, _ = p.examine(t)
		if strings.Contains(found.String(), "this node has no entries") {
			return errors.New(found.String())
		}
		return nil
	})
	found.expect(t, "workload", "identity", doctor.Warning, "nearest is spiffe://example.org/near, for which it lacks unix:gid:77", "hallmark explain")
}

func TestDoctorFindsAMalformedEndpoint(t *testing.T) {
	for endpoint, message := range map[string]string{"unix://host/path": "names no host", "http://127.0.0.1:1": "unix", "unix:///none": "there is no socket /none"} {
		out, _, code := harness.Command{Env: []string{"SPIFFE_ENDPOINT_SOCKET=" + endpoint}, Args: []string{"doctor"}}.Try(t)
		if code != 1 || !strings.Contains(out, message) {
			t.Errorf("%s: exit status %d\n%s", endpoint, code, out)
		}
	}
}

func TestDoctorFindsAuthoritiesAndBundlesThatNeedSomeone(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	p.Admin(t, "authority", "rotate", "x509")
	old := only(t, authorities(t, p.Domain, "x509", "old"))
	p.Admin(t, "authority", "taint", "x509", old.ID, "--yes")
	p.Admin(t, "federation", "create", "none.org", "--url", "https://127.0.0.1:1/bundle")
	for name, life := range map[string]time.Duration{"stale.org": -time.Hour, "late.org": 10 * time.Minute, "good.org": 24 * time.Hour} {
		file := filepath.Join(p.Dir, name)
		writeAuthority(t, file, name, life)
		p.Admin(t, "bundle", "set", name, file)
	}
	found, _ := p.examine(t)
	found.expect(t, "server", "authorities", doctor.Warning, old.ID+" is tainted", "hallmark authority revoke x509 "+old.ID)
	found.expect(t, "server", "federation", doctor.Failed, "no bundle of none.org", "hallmark federation refresh none.org")
	found.expect(t, "server", "federation", doctor.Failed, "bundle of stale.org is stale", "hallmark bundle set stale.org")
	found.expect(t, "server", "federation", doctor.Warning, "bundle of late.org is getting stale", "hallmark bundle set late.org")
	found.expect(t, "server", "federation", doctor.OK, "bundle of good.org is good", "")
}

// TestDoctorMeasuresTheClock sets this process's clock apart from the server's:
// the doctor asks the server for its time, over a connection that it verified.
func TestDoctorMeasuresTheClock(t *testing.T) {
	t.Parallel()
	p := healthy(t, harness.Settings{})
	at := func(apart time.Duration) findings {
		return doctor.Examine(t.Context(), doctor.Options{
			Server: &doctor.Program{Socket: p.AdminSocket}, Agent: &doctor.Program{Socket: p.AgentSocket},
			Now: func() time.Time { return time.Now().Add(apart) },
		})
	}
	at(0).expect(t, "agent", "clock", doctor.OK, "apart from the server's", "")
	at(7*time.Second).expect(t, "agent", "clock", doctor.Warning, "s ahead of the server's", "NTP")
	at(-8*time.Second).expect(t, "agent", "clock", doctor.Warning, "s behind the server's", "NTP")
	at(time.Minute).expect(t, "agent", "clock", doctor.Failed, "ahead of the server's", "NTP")
	// So far apart that the server's certificate does not verify.
	at(-10*time.Minute).expect(t, "agent", "clock", doctor.Failed, "this machine's clock is 10m off that", "NTP")
	at(3*time.Hour).expect(t, "agent", "clock", doctor.Failed, "off that", "NTP")
	// And what a server would look like that does not do its work.
	at(15*time.Hour).expect(t, "server", "authorities", doctor.Warning, "the next one should be prepared already", "hallmark authority rotate x509")
	at(23*time.Hour).expect(t, "server", "authorities", doctor.Warning, "another should sign already", "hallmark authority rotate jwt")
	at(25*time.Hour).expect(t, "server", "authorities", doctor.Failed, "ended", "hallmark authority rotate x509")
}
