package httpchallenge_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/httpchallenge"
	"github.com/hallmark-id/hallmark/test/harness"
)

const host = "p1.example.org"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a server's half, and the DNS by which it finds nodes: those of the
// test, on loopback.
type world struct {
	*httpchallenge.Server
	dns *harness.DNS
	log bytes.Buffer
}

func newWorld(t testing.TB, change func(*httpchallenge.ServerConfig)) *world {
	t.Helper()
	w := &world{dns: harness.NewDNS(t, nil)}
	w.dns.Set(host, "127.0.0.1")
	c := httpchallenge.ServerConfig{
		AllowedDNSPatterns: []string{`p[0-9]\.example\.org`}, AllowNonRootPorts: true,
		Networks: []string{"127.0.0.0/8"}, Resolver: w.dns.Address,
	}
	if change != nil {
		change(&c)
	}
	var err error
	w.Server, err = httpchallenge.New(c, httpchallenge.Options{Log: slog.New(slog.NewTextHandler(&w.log, nil))})
	must(t, err)
	return w
}

func newAgent(t testing.TB, change func(*httpchallenge.AgentConfig)) *httpchallenge.Agent {
	t.Helper()
	c := httpchallenge.AgentConfig{Hostname: host, Address: "127.0.0.1"}
	if change != nil {
		change(&c)
	}
	a, err := httpchallenge.NewAgent(c)
	must(t, err)
	return a
}

// attest has an agent prove to the server what it is.
func (w *world) attest(ctx context.Context, a *httpchallenge.Agent) (*attestors.Evidence, error) {
	ctx, cancel := context.WithCancel(ctx) // that of an attempt
	defer cancel()
	proof, err := a.Proof(ctx)
	if err != nil {
		return nil, err
	}
	return w.Verify(ctx, proof, a.Respond)
}

func TestANodeIsItsNameInTheDNS(t *testing.T) {
	w, a := newWorld(t, nil), newAgent(t, nil)
	for range 2 {
		e, err := w.attest(t.Context(), a)
		must(t, err)
		if e.Path != "http_challenge/p1.example.org" || fmt.Sprint(e.Selectors) != "[http_challenge:hostname:p1.example.org]" || e.CanReattest || !e.Once {
			t.Errorf("evidence is %+v", e)
		}
	}
}

func TestANameMayAttestAgainWhereOnlyRootListens(t *testing.T) {
	// A proxy listens for the agent, at a port of root's.
	w := newWorld(t, func(c *httpchallenge.ServerConfig) { c.AllowNonRootPorts, c.AllowReattestation = false, true })
	a := newAgent(t, func(c *httpchallenge.AgentConfig) { c.AdvertisedPort = 80 })
	proof, err := a.Proof(t.Context())
	must(t, err)
	if want := `{"hostname":"p1.example.org","agentname":"default","port":80}`; string(proof) != want {
		t.Errorf("proof is %s, want %s", proof, want)
	}
	l, err := net.Listen("tcp", "127.0.0.1:80")
	if err != nil {
		harness.Skip(t, err.Error())
	}
	front := &http.Server{}
	go front.Serve(l)
	t.Cleanup(func() { front.Close() })
	e, err := w.Verify(t.Context(), proof, func(_ context.Context, c []byte) ([]byte, error) {
		front.Handler = serving(c)
		return []byte("\n"), nil
	})
	must(t, err)
	if !e.CanReattest || e.Once {
		t.Errorf("evidence is %+v", e)
	}
}

// serving answers with the nonce of a challenge.
func serving(challenge []byte) http.Handler {
	_, rest, _ := strings.Cut(string(challenge), `"nonce":"`)
	nonce, _, _ := strings.Cut(rest, `"`)
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, nonce+"\n") })
}

func TestAnAgentListensOnlyWhileItAttests(t *testing.T) {
	a := newAgent(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	proof, err := a.Proof(ctx)
	must(t, err)
	_, rest, _ := strings.Cut(string(proof), `"port":`)
	port, err := strconv.Atoi(strings.TrimSuffix(rest, "}"))
	must(t, err)
	_, err = a.Respond(ctx, []byte(`{"nonce":"0123456789abcdef"}`))
	must(t, err)
	base := fmt.Sprintf("http://127.0.0.1:%d", port)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for path, want := range map[string]int{
		"/.well-known/spiffe/nodeattestor/http_challenge/default/challenge": http.StatusOK,
		"/.well-known/spiffe/nodeattestor/http_challenge/other/challenge":   http.StatusNotFound,
		"/": http.StatusNotFound,
	} {
		resp, err := client.Get(base + path)
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("GET %s: %s", path, resp.Status)
		}
	}
	cancel()
	harness.Eventually(t, "the end of the listener", func(context.Context) error {
		conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err == nil {
			conn.Close()
			return errors.New("it still listens")
		}
		return nil
	})
}

func TestImpossibleSettingsAreRefused(t *testing.T) {
	for want, change := range map[string]func(*httpchallenge.ServerConfig){
		"is missing":             func(c *httpchallenge.ServerConfig) { c.AllowedDNSPatterns = nil },
		"error parsing regexp":   func(c *httpchallenge.ServerConfig) { c.AllowedDNSPatterns = []string{"a)|(b"} },
		"between 1 and 1024":     func(c *httpchallenge.ServerConfig) { c.AllowedDNSPatterns = []string{""} },
		"required_port is 70000": func(c *httpchallenge.ServerConfig) { c.RequiredPort = 70000 },
		"set allow_non_root":     func(c *httpchallenge.ServerConfig) { c.RequiredPort, c.AllowNonRootPorts = 8080, false },
		"exclude each other":     func(c *httpchallenge.ServerConfig) { c.AllowReattestation = true },
		"networks has":           func(c *httpchallenge.ServerConfig) { c.Networks = []string{"10.1.2.3/8"} },
		"resolver is":            func(c *httpchallenge.ServerConfig) { c.Resolver = "dns.example.org:53" },
	} {
		c := httpchallenge.ServerConfig{AllowedDNSPatterns: []string{"a"}, AllowNonRootPorts: true}
		change(&c)
		if _, err := httpchallenge.New(c, httpchallenge.Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
	for want, c := range map[string]httpchallenge.AgentConfig{
		"not an address":       {Hostname: "10.0.0.1"},
		"every host has":       {Hostname: "localhost"},
		"agentname is":         {Hostname: host, Agentname: "a/b"},
		"port is -1":           {Hostname: host, Port: -1},
		"advertised_port is 7": {Hostname: host, AdvertisedPort: 70000},
		"write an IP address":  {Hostname: host, Address: "eth0"},
	} {
		if _, err := httpchallenge.NewAgent(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

// at serves what a test wants and returns its port.
func at(t testing.TB, h http.HandlerFunc) (port int) {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server.Start()
	t.Cleanup(server.Close)
	return server.Listener.Addr().(*net.TCPAddr).Port
}
