package httpchallenge_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/httpchallenge"
)

func proof(name string, port int) string {
	return fmt.Sprintf(`{"hostname":%q,"agentname":"default","port":%d}`, name, port)
}

// What a node begins with is refused before anything is asked, in the DNS or by
// HTTP, whatever would answer there.
func TestNobodyIsAskedForWhatMayNotAttest(t *testing.T) {
	var asked atomic.Int32
	port := at(t, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	for name, c := range map[string]struct{ proof, says string }{
		"another name":                    {proof("q1.example.org", port), "may not attest here"},
		"a name that begins with it":      {proof("p1.example.org.evil.org", port), "may not attest here"},
		"a name that ends with it":        {proof("evil-p1.example.org", port), "may not attest here"},
		"the name in capitals":            {proof("P1.example.org", port), "in lower case"},
		"the name with a dot":             {proof("p1.example.org.", port), "in lower case"},
		"an address":                      {proof("127.0.0.1", port), "not an address"},
		"an address as a number":          {proof("2130706433", port), "not an address"},
		"an address of version 6":         {proof("::1", port), "not an address"},
		"this host":                       {proof("localhost", port), "every host has"},
		"this host by a longer name":      {proof("p1.localhost", port), "every host has"},
		"a name with a port":              {proof("p1.example.org:80", port), "not an address"},
		"a name behind a user's":          {proof("p1.example.org@evil.org", port), "not an address"},
		"a name and a path":               {proof("p1.example.org/x", port), "not an address"},
		"a name and a line":               {proof("p1.example.org\r\nX: y", port), "not an address"},
		"a name in another script":        {proof("р1.example.org", port), "not an address"},
		"a name of 300 bytes":             {proof(strings.Repeat("a.", 150)+"org", port), "not an address"},
		"no name":                         {proof("", port), "not an address"},
		"port 0":                          {proof(host, 0), "between 1 and 65535"},
		"a port beyond all":               {proof(host, 65536+80), "between 1 and 65535"},
		"an agent's name that is a path":  {`{"hostname":"p1.example.org","agentname":"../../../x","port":80}`, "agentname is"},
		"an agent's name that is encoded": {`{"hostname":"p1.example.org","agentname":"a%2e","port":80}`, "agentname is"},
		"an agent's name with a question": {`{"hostname":"p1.example.org","agentname":"a?b","port":80}`, "agentname is"},
		"no agent's name":                 {`{"hostname":"p1.example.org","port":80}`, "agentname is"},
		"no JSON":                         {"p1.example.org", "is not JSON"},
		"too much":                        {strings.Repeat(" ", 5<<10) + proof(host, port), "the most is"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			for _, n := range []string{"q1.example.org", "p1.example.org.evil.org", "evil-p1.example.org", "p1.localhost"} {
				w.dns.Set(n, "127.0.0.1")
			}
			e, err := w.Verify(t.Context(), []byte(c.proof), func(context.Context, []byte) ([]byte, error) {
				t.Error("it was sent a challenge")
				return nil, nil
			})
			if e != nil || err == nil || !strings.Contains(err.Error(), c.says) || errors.Is(err, attestors.ErrUnavailable) {
				t.Errorf("evidence is %v, error is %v, want one with %q", e, err, c.says)
			}
			if n := w.dns.Asked(host); n != 0 {
				t.Errorf("it was looked up %d times", n)
			}
		})
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests were made", n)
	}
}

func TestOnlyThePortsThatMayBeUsedAreAsked(t *testing.T) {
	for name, change := range map[string]func(*httpchallenge.ServerConfig){
		"required":  func(c *httpchallenge.ServerConfig) { c.RequiredPort = 8081 },
		"of root's": func(c *httpchallenge.ServerConfig) { c.AllowNonRootPorts = false },
	} {
		w := newWorld(t, change)
		if e, err := w.Verify(t.Context(), []byte(proof(host, 8080)), nil); e != nil || err == nil || !strings.Contains(err.Error(), "port 8080 may not be used here") {
			t.Errorf("%s: %v, %v", name, e, err)
		}
	}
}

// The server asks at no address where a node cannot be, whatever the DNS says of an
// allowed name; nor does the node learn what is there.
func TestNoAddressIsAskedWhereNodesAreNot(t *testing.T) {
	for _, address := range []string{
		"127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
		"192.0.0.192", "198.18.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::7f00:1",
		"64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2001::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
	} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, func(c *httpchallenge.ServerConfig) { c.Networks = nil })
			w.dns.Set(host, address)
			refused(t, w, 80, func(context.Context, []byte) ([]byte, error) { return nil, nil })
			if !strings.Contains(w.log.String(), "no address that may be asked") {
				t.Errorf("the log says %s", w.log.String())
			}
		})
	}
	t.Run("outside of networks", func(t *testing.T) {
		w := newWorld(t, func(c *httpchallenge.ServerConfig) { c.Networks = []string{"10.1.0.0/16"} })
		w.dns.Set(host, "10.2.0.1", "8.8.8.8", "127.0.0.1")
		refused(t, w, 80, func(context.Context, []byte) ([]byte, error) { return nil, nil })
		if !strings.Contains(w.log.String(), "no address that may be asked") {
			t.Errorf("the log says %s", w.log.String())
		}
	})
}

// refused has the server refuse a node, in words that tell nothing of what it found.
func refused(t *testing.T, w *world, port int, ask func(context.Context, []byte) ([]byte, error)) {
	t.Helper()
	e, err := w.Verify(t.Context(), []byte(proof(host, port)), ask)
	want := fmt.Sprintf("nonce was not at http://%s:%d/.well-known/spiffe/nodeattestor/http_challenge/default/challenge; the server's log says why", host, port)
	if e != nil || err == nil || err.Error() != want {
		t.Errorf("evidence is %v, error is %v, want %q", e, err, want)
	}
}

func TestWhoDoesNotServeTheNonceIsRefused(t *testing.T) {
	elsewhere := atomic.Int32{}
	for name, c := range map[string]struct {
		serve func(w http.ResponseWriter, r *http.Request, nonce string)
		says  string
	}{
		"nothing":            {func(http.ResponseWriter, *http.Request, string) {}, "something else"},
		"another nonce":      {func(w http.ResponseWriter, _ *http.Request, n string) { io.WriteString(w, strings.Repeat("A", len(n))) }, "something else"},
		"a part of it":       {func(w http.ResponseWriter, _ *http.Request, n string) { io.WriteString(w, n[:len(n)-1]) }, "something else"},
		"it and more":        {func(w http.ResponseWriter, _ *http.Request, n string) { io.WriteString(w, n+"x") }, "something else"},
		"it after much":      {func(w http.ResponseWriter, _ *http.Request, n string) { io.WriteString(w, strings.Repeat(" ", 100)+n) }, "something else"},
		"it, among all else": {func(w http.ResponseWriter, _ *http.Request, n string) { endless(w, n) }, "something else"},
		"it, as an error": {func(w http.ResponseWriter, _ *http.Request, n string) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, n)
		}, "status 404"},
		"a redirect to it": {func(w http.ResponseWriter, r *http.Request, n string) {
			if r.URL.Path == "/elsewhere" {
				elsewhere.Add(1)
				io.WriteString(w, n)
				return
			}
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		}, "status 302"},
		"headers without end": {func(w http.ResponseWriter, _ *http.Request, n string) {
			for i := range 100 {
				w.Header().Set(fmt.Sprint("X-", i), strings.Repeat("x", 1000))
			}
			io.WriteString(w, n)
		}, "header"},
		"no HTTP": {func(w http.ResponseWriter, _ *http.Request, n string) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				io.WriteString(conn, n+"\n")
				conn.Close()
			}
		}, "malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, nil)
			var nonce atomic.Value
			nonce.Store("")
			port := at(t, func(rw http.ResponseWriter, r *http.Request) { c.serve(rw, r, nonce.Load().(string)) })
			refused(t, w, port, func(_ context.Context, challenge []byte) ([]byte, error) {
				nonce.Store(nonceOf(challenge))
				return []byte("\n"), nil
			})
			if !strings.Contains(w.log.String(), c.says) {
				t.Errorf("the log does not say %q: %s", c.says, w.log.String())
			}
		})
	}
	t.Cleanup(func() {
		if n := elsewhere.Load(); n != 0 {
			t.Errorf("%d redirects were followed", n)
		}
	})
}

func nonceOf(challenge []byte) string {
	_, rest, _ := strings.Cut(string(challenge), `"nonce":"`)
	nonce, _, _ := strings.Cut(rest, `"`)
	return nonce
}

func endless(w io.Writer, nonce string) {
	for {
		if _, err := io.WriteString(w, nonce+"\n"); err != nil {
			return
		}
	}
}

func TestANonceIsGoodForOneAttemptOnly(t *testing.T) {
	w := newWorld(t, nil)
	var served atomic.Value
	port := at(t, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, served.Load().(string)) })
	_, err := w.Verify(t.Context(), []byte(proof(host, port)), func(_ context.Context, c []byte) ([]byte, error) {
		served.Store(nonceOf(c))
		return []byte("\n"), nil
	})
	must(t, err)
	refused(t, w, port, func(context.Context, []byte) ([]byte, error) { return []byte("\n"), nil })
}

// The name that was looked at is what is connected to: it is not looked up again.
func TestANameIsLookedUpOnce(t *testing.T) {
	w, a := newWorld(t, nil), newAgent(t, nil)
	_, err := w.attest(t.Context(), a)
	must(t, err)
	if n := w.dns.Asked(host); n > 2 { // of either version
		t.Errorf("it was looked up %d times", n)
	}
}

func TestANodeThatKeepsTheServerWaitingIsGivenUp(t *testing.T) {
	w := newWorld(t, nil)
	release := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	port := at(t, func(http.ResponseWriter, *http.Request) { cancel(); <-release })
	defer close(release)
	if e, err := w.Verify(ctx, []byte(proof(host, port)), func(context.Context, []byte) ([]byte, error) { return nil, nil }); e != nil || err == nil {
		t.Errorf("evidence is %v, error is %v", e, err)
	}
}

// A server cannot have an agent serve anything but a nonce, nor without a proof.
func TestAServerThatLiesHasAnAgentServeNothing(t *testing.T) {
	for _, challenge := range []string{
		"", "x", `{}`, `{"nonce":""}`, `{"nonce":"short"}`, `{"nonce":"<script>alert(1)</script>"}`, `{"nonce":"0123456789abcdef\r\nx"}`,
		`{"nonce":"` + strings.Repeat("a", 65) + `"}`, `{"nonce":"0123456789abcdef"` + strings.Repeat(" ", 5<<10) + `}`,
	} {
		a := newAgent(t, nil)
		_, err := a.Proof(t.Context())
		must(t, err)
		if _, err := a.Respond(t.Context(), []byte(challenge)); err == nil || !strings.Contains(err.Error(), "no nonce") {
			t.Errorf("%q: %v", challenge, err)
		}
		if _, err := a.Respond(t.Context(), []byte(`{"nonce":"0123456789abcdef"}`)); err == nil || !strings.Contains(err.Error(), "follows no proof") {
			t.Errorf("a second challenge: %v", err)
		}
	}
}
