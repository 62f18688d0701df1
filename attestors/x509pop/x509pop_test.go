package x509pop_test

import (
	"crypto/sha1"
	"crypto/x509"
	"encoding/hex"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors/x509pop"
	"github.com/hallmark-id/hallmark/test/harness"
)

// openssl runs openssl in a directory. Without it the test is skipped, or fails in CI.
func openssl(t testing.TB, dir string, args ...string) string {
	t.Helper()
	harness.NeedCommand(t, "openssl")
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestANodeAttestsWithKeysAndChainsOfOpenSSL goes through keys as an operator
// makes them, in every form that files have them in.
func TestANodeAttestsWithKeysAndChainsOfOpenSSL(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "ca.cnf"), []byte("basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\n"))
	write(t, filepath.Join(dir, "leaf.cnf"), []byte("basicConstraints=CA:false\nkeyUsage=critical,digitalSignature\n"+
		"extendedKeyUsage=serverAuth\nsubjectAltName=DNS:host-1,URI:x509pop://example.org/rack/r7\n"))
	ca := func(name, key, issuer string) {
		openssl(t, dir, append([]string{"req", "-new", "-nodes", "-keyout", name + ".key", "-out", name + ".csr", "-subj", "/CN=" + name, "-newkey"}, strings.Fields(key)...)...)
		sign := []string{"x509", "-req", "-in", name + ".csr", "-out", name + ".pem", "-days", "1", "-extfile", "ca.cnf", "-text"}
		if issuer == "" {
			sign = append(sign, "-signkey", name+".key")
		} else {
			sign = append(sign, "-CA", issuer+".pem", "-CAkey", issuer+".key", "-CAcreateserial")
		}
		openssl(t, dir, sign...)
	}
	ca("root", "rsa:2048", "")
	ca("middle", "ec -pkeyopt ec_paramgen_curve:P-384", "root")
	ca("low", "rsa:2048", "middle")
	read := func(names ...string) (out []byte) {
		for _, name := range names {
			data, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, data...)
		}
		return out
	}
	s, err := x509pop.New(x509pop.ServerConfig{CABundlePath: filepath.Join(dir, "root.pem")}, x509pop.Options{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct{ name, make, form string }{
		{"P-256", "ecparam -genkey -name prime256v1 -out key", ""}, // SEC 1, parameters before it
		{"P-384", "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out key", ""},
		{"P-384 in SEC 1", "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out key", "ec -in key -out key"},
		{"P-521", "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-521 -out key", ""},
		{"RSA 2048", "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out key", ""},
		{"RSA 2048 in PKCS #1", "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out key", "rsa -in key -traditional -out key"},
		{"RSA 4096", "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:4096 -out key", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			openssl(t, dir, strings.Fields(c.make)...)
			if c.form != "" {
				openssl(t, dir, strings.Fields(c.form)...)
			}
			openssl(t, dir, "req", "-new", "-key", "key", "-subj", "/O=Example/CN=host-1", "-out", "leaf.csr")
			openssl(t, dir, "x509", "-req", "-in", "leaf.csr", "-out", "leaf.pem", "-days", "1", "-extfile", "leaf.cnf", "-CA", "low.pem", "-CAkey", "low.key", "-set_serial", "0xa1b2c")
			want := []string{"x509pop:san:rack:r7", "x509pop:serialnumber:0a1b2c", "x509pop:subject:cn:host-1"}
			for _, name := range []string{"low.pem", "middle.pem", "root.pem"} {
				want = append(want, "x509pop:ca:fingerprint:"+opensslFingerprint(t, dir, name))
			}
			slices.Sort(want)

			one := x509pop.AgentConfig{
				PrivateKeyPath:  filepath.Join(dir, "key"),
				CertificatePath: write(t, filepath.Join(dir, "chain.pem"), read("leaf.pem", "low.pem", "middle.pem")),
			}
			two := x509pop.AgentConfig{
				PrivateKeyPath:    write(t, filepath.Join(dir, "both.pem"), read("key", "leaf.pem")),
				CertificatePath:   filepath.Join(dir, "both.pem"),
				IntermediatesPath: write(t, filepath.Join(dir, "intermediates.pem"), read("middle.pem", "low.pem")),
			}
			for _, files := range []x509pop.AgentConfig{one, two} {
				evidence := mustAttest(t, s, newAgent(t, files))
				if path := "x509pop/" + opensslFingerprint(t, dir, "leaf.pem"); evidence.Path != path {
					t.Errorf("path is %s, want %s", evidence.Path, path)
				}
				if got := values(evidence); !slices.Equal(got, want) {
					t.Errorf("selectors are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
				}
				if !evidence.CanReattest {
					t.Error("the node cannot attest again")
				}
			}
		})
	}
}

func opensslFingerprint(t testing.TB, dir, file string) string {
	_, hex, _ := strings.Cut(openssl(t, dir, "x509", "-in", file, "-noout", "-fingerprint", "-sha1"), "=")
	return strings.ToLower(strings.ReplaceAll(strings.TrimSpace(hex), ":", ""))
}

func sha1Of(cert *x509.Certificate) string {
	sum := sha1.Sum(cert.Raw)
	return hex.EncodeToString(sum[:])
}

func uris(t testing.TB, texts ...string) func(*x509.Certificate) {
	t.Helper()
	var out []*url.URL
	for _, text := range texts {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, u)
	}
	return func(c *x509.Certificate) { c.URIs = out }
}

func TestSelectorsSayWhatTheCertificateSays(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	common := func(id *identity) []string {
		return []string{"x509pop:ca:fingerprint:" + sha1Of(root.cert), "x509pop:serialnumber:0" + id.cert.SerialNumber.Text(16)}
	}
	cn := func(name string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.Subject.CommonName = name }
	}
	for name, c := range map[string]struct {
		change func(*x509.Certificate)
		want   []string
	}{
		"no common name":           {cn(""), nil},
		"any common name":          {cn("a/b: ü"), []string{"x509pop:subject:cn:a/b: ü"}},
		"an unreadable name":       {cn("a\x1b[2J"), nil},
		"a line in a name":         {cn("a\nb"), nil},
		"a name beyond the bounds": {cn(strings.Repeat("x", 5000)), nil},
		"URIs": {uris(t, "x509pop://example.org/rack/r7", "x509pop://example.org/rack/r8/", "x509pop://example.org/path/to/it", "x509pop://example.org/sp%61ce/a%20b"),
			[]string{"x509pop:san:path:to/it", "x509pop:san:rack:r7", "x509pop:san:rack:r8", "x509pop:san:space:a b", "x509pop:subject:cn:host-1"}},
		"URIs of others": {uris(t, "x509pop://other.org/a/b", "x509pop://example.org.evil.org/a/b", "x509pop://u@example.org/a/b", "spiffe://example.org/a/b", "https://example.org/a/b",
			"x509pop://example.org/a", "x509pop://example.org/a:b", "x509pop://example.org/a:b/c", "x509pop://example.org", "x509pop://example.org///"), []string{"x509pop:subject:cn:host-1"}},
	} {
		id := root.node(t, c.change)
		want := append(common(id), c.want...)
		slices.Sort(want)
		if got := values(mustAttest(t, s, id.agent(t))); !slices.Equal(got, want) {
			t.Errorf("%s: selectors are %q, want %q", name, got, want)
		}
	}
}

func TestEveryAuthorityOfEveryChainIsASelector(t *testing.T) {
	// An intermediate that two roots have signed.
	one, two := newRoot(t, "one"), newRoot(t, "two")
	middle := one.intermediate(t, "middle")
	cross := two.issue(t, middle.key, asCA("middle"))
	id := middle.node(t, nil)
	id.above = append(id.above, cross.cert)
	s := newServer(t, x509pop.ServerConfig{CABundlePath: bundle(t, one), CABundlePaths: []string{bundle(t, two)}})
	got := values(mustAttest(t, s, id.agent(t)))
	for _, ca := range []*identity{one, two, middle, cross} {
		if want := "x509pop:ca:fingerprint:" + sha1Of(ca.cert); !slices.Contains(got, want) {
			t.Errorf("selectors are %q, without %s", got, want)
		}
	}
}

func TestAChangedCABundleCountsAtOnce(t *testing.T) {
	one, two := newRoot(t, "one"), newRoot(t, "two")
	path := bundle(t, one)
	s := newServer(t, x509pop.ServerConfig{CABundlePaths: []string{path}})
	a, b := one.node(t, nil).agent(t), two.node(t, nil).agent(t)
	admitted := func(want ...bool) {
		t.Helper()
		for i, agent := range []*x509pop.Agent{a, b} {
			if _, err := attest(t, s, agent); (err == nil) != want[i] {
				t.Errorf("agent %d: %v", i+1, err)
			}
		}
	}
	admitted(true, false)
	rewriteBundle(t, path, one, two)
	admitted(true, true)
	rewriteBundle(t, path, two)
	admitted(false, true)
}

func TestACABundleThatCannotBeReadAdmitsNobodyUntilItCan(t *testing.T) {
	root := newRoot(t, "root")
	path := bundle(t, root)
	s := newServer(t, x509pop.ServerConfig{CABundlePath: path})
	agent := root.node(t, nil).agent(t)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other := newRoot(t, "other")
	for name, data := range map[string][]byte{
		"empty":       {},
		"half":        whole[:len(whole)/2],
		"one, a half": append(pemOf(other.cert), whole[:len(whole)-30]...),
		"a half, one": append(whole[:len(whole)/2:len(whole)/2], pemOf(other.cert)...),
		"a node's":    append(slices.Clone(whole), pemOf(root.node(t, nil).cert)...),
		"too large":   append(slices.Clone(whole), make([]byte, 4<<20)...),
	} {
		write(t, path, data)
		if _, err := attest(t, s, agent); !isUnavailable(err) || strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want that it cannot be checked now, and no path", name, err)
		}
		write(t, path, whole)
		mustAttest(t, s, agent)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := attest(t, s, agent); !isUnavailable(err) {
		t.Errorf("removed: got %v", err)
	}
}

func TestNodesAttestWhileTheCABundleChanges(t *testing.T) {
	root, other := newRoot(t, "root"), newRoot(t, "other")
	paths := []string{bundle(t, root), bundle(t, other)}
	s := newServer(t, x509pop.ServerConfig{CABundlePaths: paths})
	agent := root.node(t, nil).agent(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 20 {
			temporary := bundle(t, other, root) // replaced as a whole, as it should be
			if err := os.Rename(temporary, paths[1]); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 20 {
		mustAttest(t, s, agent)
	}
	<-done
}

// spiffe makes a server that admits the X509-SVIDs of an authority.
func spiffe(t testing.TB, c x509pop.ServerConfig, of spiffeid.TrustDomain, root *identity) *x509pop.Server {
	t.Helper()
	c.Mode = "spiffe"
	pool := x509.NewCertPool()
	pool.AddCert(root.cert)
	s, err := x509pop.New(c, x509pop.Options{TrustDomain: td, Now: at(now), Roots: func(td spiffeid.TrustDomain) *x509.CertPool {
		if td != of {
			return nil
		}
		return pool
	}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAnX509SVIDIsExchangedForAnAgent(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.org")
	root := newRoot(t, "root")
	for name, c := range map[string]struct {
		config x509pop.ServerConfig
		of     spiffeid.TrustDomain
		id     string
		want   string // path; empty: refused
	}{
		"as SPIRE does":           {x509pop.ServerConfig{}, td, "spiffe://example.org/spire-exchange/host-1", "x509pop/host-1"},
		"a longer path":           {x509pop.ServerConfig{}, td, "spiffe://example.org/spire-exchange/eu/host-1", "x509pop/eu/host-1"},
		"another prefix":          {x509pop.ServerConfig{SVIDPrefix: "/nodes/"}, td, "spiffe://example.org/nodes/host-1", "x509pop/host-1"},
		"any prefix":              {x509pop.ServerConfig{SVIDPrefix: "/"}, td, "spiffe://example.org/nodes/host-1", "x509pop/nodes/host-1"},
		"another trust domain":    {x509pop.ServerConfig{TrustDomain: "other.org"}, other, "spiffe://other.org/spire-exchange/host-1", "x509pop/host-1"},
		"a template":              {x509pop.ServerConfig{AgentPathTemplate: "/x509pop/exchanged/{{ .SVIDPathTrimmed }}"}, td, "spiffe://example.org/spire-exchange/eu/host-1", "x509pop/exchanged/eu/host-1"},
		"outside of the prefix":   {x509pop.ServerConfig{}, td, "spiffe://example.org/host-1", ""},
		"beside the prefix":       {x509pop.ServerConfig{}, td, "spiffe://example.org/spire-exchanged/host-1", ""},
		"the prefix itself":       {x509pop.ServerConfig{}, td, "spiffe://example.org/spire-exchange", ""},
		"the trust domain itself": {x509pop.ServerConfig{SVIDPrefix: "/"}, td, "spiffe://example.org", ""},
		"the wrong trust domain":  {x509pop.ServerConfig{}, td, "spiffe://other.org/spire-exchange/host-1", ""},
		"an agent's own":          {x509pop.ServerConfig{SVIDPrefix: "/"}, td, "spiffe://example.org/spire/agent/join_token/x", ""},
		"the server's":            {x509pop.ServerConfig{SVIDPrefix: "/"}, td, "spiffe://example.org/spire/server", ""},
		"no SPIFFE ID":            {x509pop.ServerConfig{SVIDPrefix: "/"}, td, "https://example.org/spire-exchange/host-1", ""},
		"a dot in the path":       {x509pop.ServerConfig{}, td, "spiffe://example.org/spire-exchange/../join_token/x", ""},
		"an escape in the path":   {x509pop.ServerConfig{}, td, "spiffe://example.org/spire-exchange/a%2fb", ""},
	} {
		s := spiffe(t, c.config, c.of, root)
		svid := root.intermediate(t, "middle").node(t, uris(t, c.id))
		if c.want == "" {
			if _, err := s.Verify(t.Context(), svid.payload(t), unasked(t)); err == nil {
				t.Errorf("%s: admitted", name)
			}
			continue
		}
		if evidence := mustAttest(t, s, svid.agent(t)); evidence.Path != c.want || !evidence.CanReattest {
			t.Errorf("%s: evidence is %+v, want path %s", name, evidence, c.want)
		}
	}
}

func TestWhatIsNoX509SVIDIsNotExchanged(t *testing.T) {
	root := newRoot(t, "root")
	s := spiffe(t, x509pop.ServerConfig{}, td, root)
	const id = "spiffe://example.org/spire-exchange/host-1"
	for name, change := range map[string]func(*x509.Certificate){
		"no URI":         nil,
		"two SPIFFE IDs": uris(t, id, "spiffe://example.org/spire-exchange/host-2"),
		"another URI":    uris(t, id, "x509pop://example.org/a/b"),
		"an authority's key usage": func(c *x509.Certificate) {
			uris(t, id)(c)
			c.KeyUsage |= x509.KeyUsageCertSign
		},
	} {
		if _, err := s.Verify(t.Context(), root.node(t, change).payload(t), unasked(t)); err == nil {
			t.Errorf("%s: admitted", name)
		}
	}
	if _, err := s.Verify(t.Context(), newRoot(t, "root").node(t, uris(t, id)).payload(t), unasked(t)); err == nil {
		t.Error("another authority's SVID is admitted")
	}
}

func TestWithoutTheBundleOfTheSVIDsNobodyIsAdmitted(t *testing.T) {
	root := newRoot(t, "root")
	s := spiffe(t, x509pop.ServerConfig{TrustDomain: "other.org"}, td, root)
	svid := root.node(t, uris(t, "spiffe://other.org/spire-exchange/host-1"))
	if _, err := s.Verify(t.Context(), svid.payload(t), unasked(t)); !isUnavailable(err) {
		t.Errorf("got %v", err)
	}
}

func TestAContradictoryConfigurationIsRefused(t *testing.T) {
	dir := t.TempDir()
	root := newRoot(t, "root")
	good := bundle(t, root)
	node := write(t, filepath.Join(dir, "node.pem"), pemOf(root.node(t, nil).cert))
	empty := write(t, filepath.Join(dir, "empty.pem"), nil)
	for name, c := range map[string]struct {
		config x509pop.ServerConfig
		want   string
	}{
		"nothing":                  {x509pop.ServerConfig{}, "ca_bundle_path is missing"},
		"an unknown mode":          {x509pop.ServerConfig{Mode: "pki", CABundlePath: good}, `mode is "pki"`},
		"no such file":             {x509pop.ServerConfig{CABundlePath: filepath.Join(dir, "no.pem")}, "no.pem: no such file"},
		"a directory":              {x509pop.ServerConfig{CABundlePath: dir}, "no regular file"},
		"an empty file":            {x509pop.ServerConfig{CABundlePath: empty}, "empty.pem: no certificate in it"},
		"one empty file":           {x509pop.ServerConfig{CABundlePaths: []string{good, empty}}, "empty.pem: no certificate in it"},
		"a node's certificate":     {x509pop.ServerConfig{CABundlePath: node}, `"CN=host-1", is not that of a certificate authority`},
		"too many files":           {x509pop.ServerConfig{CABundlePaths: make([]string, 65)}, "names 65 files"},
		"a prefix without spiffe":  {x509pop.ServerConfig{CABundlePath: good, SVIDPrefix: "/a"}, "svid_prefix is for mode spiffe"},
		"a domain without spiffe":  {x509pop.ServerConfig{CABundlePath: good, TrustDomain: "other.org"}, "trust_domain is for mode spiffe"},
		"a bundle with spiffe":     {x509pop.ServerConfig{Mode: "spiffe", CABundlePath: good}, "ca_bundle_path is for mode external_pki"},
		"bundles with spiffe":      {x509pop.ServerConfig{Mode: "spiffe", CABundlePaths: []string{good}}, "ca_bundle_path is for mode external_pki"},
		"a bad domain":             {x509pop.ServerConfig{Mode: "spiffe", TrustDomain: "Other"}, "trust_domain: "},
		"a relative prefix":        {x509pop.ServerConfig{Mode: "spiffe", SVIDPrefix: "nodes"}, `svid_prefix "nodes"`},
		"a reserved prefix":        {x509pop.ServerConfig{Mode: "spiffe", SVIDPrefix: "/spire/agent"}, "not exchanged"},
		"all of the reserved ones": {x509pop.ServerConfig{Mode: "spiffe", SVIDPrefix: "/spire"}, "not exchanged"},
		"a broken template":        {x509pop.ServerConfig{CABundlePath: good, AgentPathTemplate: "x509pop/{{"}, "agent_path_template: "},
	} {
		_, err := x509pop.New(c.config, x509pop.Options{TrustDomain: td})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

func TestTheClockOfTheServerCounts(t *testing.T) {
	root := newRoot(t, "root")
	c := x509pop.ServerConfig{CABundlePath: bundle(t, root)}
	agent := root.node(t, nil).agent(t)
	for when, want := range map[time.Time]bool{
		now:                         true,
		now.Add(time.Hour):          true,
		now.Add(61 * time.Minute):   false,
		now.Add(-61 * time.Minute):  false,
		now.Add(100000 * time.Hour): false,
	} {
		s, err := x509pop.New(c, x509pop.Options{TrustDomain: td, Now: at(when)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := attest(t, s, agent); (err == nil) != want {
			t.Errorf("at %v: %v", when, err)
		}
	}
}
