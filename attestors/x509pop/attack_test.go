package x509pop_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/x509pop"
)

func isUnavailable(err error) bool { return errors.Is(err, attestors.ErrUnavailable) }

// message is a challenge or a response, without the attestor's own types.
type message map[string]map[string][]byte

func parse(t testing.TB, data []byte) message {
	t.Helper()
	var m message
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m message) bytes(t testing.TB) []byte {
	t.Helper()
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// hash is what the two sides sign.
func hash(server, node []byte) []byte {
	sum := sha256.Sum256(append(append([]byte{}, server...), node...))
	return sum[:]
}

// respond signs a challenge as SPIRE's agents do, with any key.
func respond(t testing.TB, key crypto.Signer, challenge []byte) message {
	t.Helper()
	own := make([]byte, 32)
	rand.Read(own)
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, key, hash(parse(t, challenge)["ecdsa_signature"]["nonce"], own))
		if err != nil {
			t.Fatal(err)
		}
		return message{"ecdsa_signature": {"nonce": own, "r": r.Bytes(), "s": s.Bytes()}, "rsa_signature": nil}
	case *rsa.PrivateKey:
		signature, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, hash(parse(t, challenge)["rsa_signature"]["nonce"], own), nil)
		if err != nil {
			t.Fatal(err)
		}
		return message{"rsa_signature": {"nonce": own, "signature": signature}, "ecdsa_signature": nil}
	}
	t.Fatalf("no key to respond with: %T", key)
	return nil
}

var rsaKeys = sync.OnceValue(func() (keys [2]*rsa.PrivateKey) {
	for i := range keys {
		var err error
		if keys[i], err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			panic(err)
		}
	}
	return keys
})

func TestAReplayedResponseIsRefused(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	for _, key := range []crypto.Signer{newKey(t), rsaKeys()[0]} {
		id := root.issue(t, key, nil)
		agent := id.agent(t)
		proof, err := agent.Proof(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var seen []byte
		if _, err := s.Verify(t.Context(), proof, func(ctx context.Context, challenge []byte) ([]byte, error) {
			seen, err = agent.Respond(ctx, challenge)
			return seen, err
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Verify(t.Context(), proof, func(context.Context, []byte) ([]byte, error) { return seen, nil }); err == nil {
			t.Errorf("%T: a replayed response is accepted", key)
		}
	}
}

func TestChallengesDiffer(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	proof := root.node(t, nil).payload(t)
	seen := make(map[string]bool)
	for range 20 {
		_, err := s.Verify(t.Context(), proof, func(_ context.Context, challenge []byte) ([]byte, error) {
			nonce := parse(t, challenge)["ecdsa_signature"]["nonce"]
			if len(nonce) != 32 || seen[string(nonce)] {
				t.Errorf("nonce is %x", nonce)
			}
			seen[string(nonce)] = true
			return nil, context.Canceled
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
}

func TestAWrongResponseIsRefused(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	ec, rs := newKey(t), rsaKeys()[0]
	const sec, srsa = "ecdsa_signature", "rsa_signature"
	n := ec.Params().N

	for name, c := range map[string]struct {
		key     crypto.Signer // of the certificate
		respond func(challenge []byte) []byte
	}{
		"another ECDSA key": {ec, func(c []byte) []byte { return respond(t, newKey(t), c).bytes(t) }},
		"another RSA key":   {rs, func(c []byte) []byte { return respond(t, rsaKeys()[1], c).bytes(t) }},
		"another server's nonce": {ec, func([]byte) []byte {
			other := message{sec: {"nonce": make([]byte, 32)}}.bytes(t)
			return respond(t, ec, other).bytes(t)
		}},
		"another server's nonce, RSA": {rs, func([]byte) []byte {
			other := message{srsa: {"nonce": make([]byte, 32)}}.bytes(t)
			return respond(t, rs, other).bytes(t)
		}},
		"another node's nonce": {ec, func(c []byte) []byte {
			m := respond(t, ec, c)
			m[sec]["nonce"][0] ^= 1
			return m.bytes(t)
		}},
		"nonces shifted between the two": {ec, func(c []byte) []byte {
			both := append(parse(t, c)[sec]["nonce"], make([]byte, 31)...)
			sum := sha256.Sum256(both)
			r, s, err := ecdsa.Sign(rand.Reader, ec, sum[:])
			if err != nil {
				t.Fatal(err)
			}
			return message{sec: {"nonce": make([]byte, 31), "r": r.Bytes(), "s": s.Bytes()}}.bytes(t)
		}},
		"a longer nonce": {rs, func(c []byte) []byte {
			m := respond(t, rs, c)
			m[srsa]["nonce"] = append(m[srsa]["nonce"], 0)
			return m.bytes(t)
		}},
		"no nonce": {ec, func(c []byte) []byte {
			m := respond(t, ec, c)
			delete(m[sec], "nonce")
			return m.bytes(t)
		}},
		"PKCS #1 v1.5": {rs, func(c []byte) []byte {
			own := make([]byte, 32)
			signature, err := rsa.SignPKCS1v15(rand.Reader, rs, crypto.SHA256, hash(parse(t, c)[srsa]["nonce"], own))
			if err != nil {
				t.Fatal(err)
			}
			return message{srsa: {"nonce": own, "signature": signature}}.bytes(t)
		}},
		"zeros":       {ec, func([]byte) []byte { return ecResponse(t, new(big.Int), new(big.Int)) }},
		"the order":   {ec, func([]byte) []byte { return ecResponse(t, n, n) }},
		"one and one": {ec, func([]byte) []byte { return ecResponse(t, big.NewInt(1), big.NewInt(1)) }},
		"numbers too large": {ec, func(c []byte) []byte {
			m := respond(t, ec, c)
			r := new(big.Int).SetBytes(m[sec]["r"])
			m[sec]["r"] = r.Add(r, new(big.Int).Lsh(n, 8)).Bytes()
			return m.bytes(t)
		}},
		"r and s exchanged": {ec, func(c []byte) []byte {
			m := respond(t, ec, c)
			m[sec]["r"], m[sec]["s"] = m[sec]["s"], m[sec]["r"]
			return m.bytes(t)
		}},
		"no signature":     {ec, func(c []byte) []byte { return message{sec: {"nonce": make([]byte, 32)}}.bytes(t) }},
		"no RSA signature": {rs, func(c []byte) []byte { return message{srsa: {"nonce": make([]byte, 32)}}.bytes(t) }},
		"a key of RSA":     {ec, func(c []byte) []byte { return respond(t, rs, renamed(t, c, sec, srsa)).bytes(t) }},
		"a key of ECDSA":   {rs, func(c []byte) []byte { return respond(t, ec, renamed(t, c, srsa, sec)).bytes(t) }},
		"both kinds": {ec, func(c []byte) []byte {
			return both(respond(t, ec, c), respond(t, rs, renamed(t, c, sec, srsa))).bytes(t)
		}},
		"the challenge":     {ec, func(c []byte) []byte { return c }},
		"nothing":           {ec, func([]byte) []byte { return nil }},
		"null":              {ec, func([]byte) []byte { return []byte("null") }},
		"no object":         {ec, func([]byte) []byte { return []byte(`["ecdsa_signature"]`) }},
		"trailing JSON":     {ec, func(c []byte) []byte { return append(respond(t, ec, c).bytes(t), "{}"...) }},
		"a trailing letter": {ec, func(c []byte) []byte { return append(respond(t, ec, c).bytes(t), 'x') }},
		"far too much":      {ec, func(c []byte) []byte { return append(respond(t, ec, c).bytes(t), strings.Repeat(" ", 1<<20)...) }},
	} {
		id := root.issue(t, c.key, nil)
		asked := 0
		evidence, err := s.Verify(t.Context(), id.payload(t), func(_ context.Context, challenge []byte) ([]byte, error) {
			asked++
			return c.respond(challenge), nil
		})
		if err == nil || evidence != nil {
			t.Errorf("%s: admitted", name)
		}
		if asked != 1 {
			t.Errorf("%s: challenged %d times", name, asked)
		}
	}
}

func ecResponse(t testing.TB, r, s *big.Int) []byte {
	return message{"ecdsa_signature": {"nonce": make([]byte, 32), "r": r.Bytes(), "s": s.Bytes()}}.bytes(t)
}

func renamed(t testing.TB, challenge []byte, from, to string) []byte {
	return message{to: parse(t, challenge)[from]}.bytes(t)
}

func both(a, b message) message {
	return message{"ecdsa_signature": a["ecdsa_signature"], "rsa_signature": b["rsa_signature"]}
}

// TestACertificateThatProvesNothingIsRefused goes through certificates whose
// holders must not even be challenged.
func TestACertificateThatProvesNothingIsRefused(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	imitation := newRoot(t, "root")
	constrained := root.issue(t, newKey(t), func(c *x509.Certificate) {
		asCA("constrained")(c)
		c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"eu.example.org"}, true
	})
	leafOnly := root.node(t, func(c *x509.Certificate) { c.Subject.CommonName = "no authority" })
	expired := root.issue(t, newKey(t), func(c *x509.Certificate) {
		asCA("expired")(c)
		c.NotAfter = now.Add(-1)
	})
	short := root.issue(t, newKey(t), func(c *x509.Certificate) {
		asCA("short")(c)
		c.MaxPathLenZero = true
	})
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		id   *identity
		want string
	}{
		"of an authority that only shares the name": {imitation.node(t, nil), "does not lead to an authority"},
		"self-signed":        {(*identity)(nil).issue(t, newKey(t), nil), "does not lead to an authority"},
		"self-made chain":    {newRoot(t, "mine").intermediate(t, "middle").node(t, nil), "does not lead to an authority"},
		"without its middle": {&identity{cert: root.intermediate(t, "middle").node(t, nil).cert}, "does not lead to an authority"},
		"expired":            {root.node(t, func(c *x509.Certificate) { c.NotAfter = now.Add(-1) }), "expired or is not yet valid"},
		"not yet valid":      {root.node(t, func(c *x509.Certificate) { c.NotBefore = now.Add(1e9) }), "expired or is not yet valid"},
		"below an expired one": {&identity{cert: expired.node(t, nil).cert, above: []*x509.Certificate{expired.cert}},
			"expired or is not yet valid"},
		"below another node's":       {leafOnly.below(t), "does not lead to an authority"},
		"too far below":              {short.intermediate(t, "middle").node(t, nil), "too many intermediates"},
		"with a name not allowed":    {constrained.node(t, func(c *x509.Certificate) { c.DNSNames = []string{"us.example.org"} }), "not permitted"},
		"the authority's own":        {root, "certificate authority"},
		"an intermediate's own":      {root.intermediate(t, "middle"), "certificate authority"},
		"an authority that may sign": {root.issue(t, newKey(t), func(c *x509.Certificate) { asCA("x")(c); c.KeyUsage |= x509.KeyUsageDigitalSignature }), "certificate authority"},
		"no key usage":               {root.node(t, func(c *x509.Certificate) { c.KeyUsage = 0 }), "digitalSignature"},
		"another key usage":          {root.node(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement }), "digitalSignature"},
		"an unknown critical extension": {root.node(t, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}), "unhandled critical extension"},
		"Ed25519":       {root.issue(t, ed, nil), "Ed25519"},
		"P-224":         {root.issue(t, p224, nil), "P-224"},
		"RSA 1024":      {root.withRSA(t, 1024, 65537), "1024 bits"},
		"RSA 2047":      {root.withRSA(t, 2047, 65537), "2047 bits"},
		"RSA 8193":      {root.withRSA(t, 8193, 65537), "8193 bits"},
		"RSA 16384":     {root.withRSA(t, 16384, 65537), "16384 bits"},
		"exponent 1":    {root.withRSA(t, 2048, 1), "exponent 1;"},
		"exponent 3":    {root.withRSA(t, 2048, 3), "exponent 3;"},
		"even exponent": {root.withRSA(t, 2048, 65538), "exponent 65538;"},
		"too many URIs": {root.node(t, func(c *x509.Certificate) {
			var all []string
			for i := range 101 {
				all = append(all, fmt.Sprintf("x509pop://example.org/k/%d", i))
			}
			uris(t, all...)(c)
		}), "101 URIs"},
		"a large key above it": {&identity{cert: root.node(t, nil).cert, above: []*x509.Certificate{root.withRSA(t, 16384, 65537).cert}}, "certificate 2 of the chain"},
	} {
		_, err := s.Verify(t.Context(), c.id.payload(t), unasked(t))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

// below makes a certificate that was signed with a node's key.
func (id *identity) below(t testing.TB) *identity {
	out := id.node(t, nil)
	out.above = []*x509.Certificate{id.cert}
	return out
}

// withRSA makes a certificate of an RSA key of which nobody has the other half.
func (id *identity) withRSA(t testing.TB, bits uint, exponent int) *identity {
	t.Helper()
	n := new(big.Int).Lsh(big.NewInt(1), bits-1)
	public := &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: exponent}
	return id.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(7), KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: now, NotAfter: now,
	}, public, nil)
}

func TestARefusalIsShortAndDoesNotTellWhatTheServerTrusts(t *testing.T) {
	s := trusting(t, newRoot(t, "root"))
	id := newRoot(t, "root").node(t, func(c *x509.Certificate) { c.Subject.CommonName = strings.Repeat("long", 1000) })
	_, err := s.Verify(t.Context(), id.payload(t), unasked(t))
	if err == nil || strings.Contains(err.Error(), "candidate") || len(err.Error()) > 1000 {
		t.Errorf("error is %v", err)
	}
}

func TestAMalformedPayloadIsRefused(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	id := root.node(t, nil)
	good := string(id.payload(t))
	many := make([][]byte, 11)
	for i := range many {
		many[i] = id.cert.Raw
	}
	for name, c := range map[string]struct{ payload, want string }{
		"nothing":              {"", "malformed"},
		"null":                 {"null", "no certificate"},
		"an empty object":      {"{}", "no certificate"},
		"an empty list":        {`{"certificates": []}`, "no certificate"},
		"a null certificate":   {`{"certificates": [null]}`, "certificate 1 of the chain is malformed"},
		"an empty certificate": {`{"certificates": [""]}`, "certificate 1 of the chain is malformed"},
		"no base64":            {`{"certificates": ["?"]}`, "malformed"},
		"no certificate":       {`{"certificates": ["AAAA"]}`, "certificate 1 of the chain is malformed"},
		"not a list":           {`{"certificates": "AAAA"}`, "malformed"},
		"not an object":        {`[]`, "malformed"},
		"a later one is bad":   {string(payload(t, id.cert.Raw, []byte("x"))), "certificate 2 of the chain is malformed"},
		"trailing DER":         {string(payload(t, append(id.cert.Raw[:len(id.cert.Raw):len(id.cert.Raw)], 0))), "certificate 1 of the chain is malformed"},
		"trailing JSON":        {good + good, "malformed"},
		"a trailing letter":    {good + "x", "malformed"},
		"eleven certificates":  {string(payload(t, many...)), "holds 11 certificates"},
		"far too many":         {`{"certificates": [` + strings.Repeat(`"",`, 20000) + `""]}`, "holds 20001 certificates"},
		"far too much":         {good + strings.Repeat(" ", 64<<10), "the most is 65536"},
		"one huge certificate": {string(payload(t, make([]byte, 1<<20))), "the most is 65536"},
		"deep nesting":         {strings.Repeat(`{"certificates":`, 4000), "malformed"},
	} {
		_, err := s.Verify(t.Context(), []byte(c.payload), unasked(t))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %.200v, want one with %q", name, err, c.want)
		}
	}
}

func TestTenCertificatesAreNotTooMany(t *testing.T) {
	root := newRoot(t, "root")
	id := root
	for i := range 9 {
		id = id.intermediate(t, fmt.Sprint("middle ", i))
	}
	mustAttest(t, trusting(t, root), id.node(t, nil).agent(t))
}

func TestWhatMayStandInAPath(t *testing.T) {
	root := newRoot(t, "root")
	ca := bundle(t, root)
	const cn = "x509pop/{{ .Subject.CommonName }}"
	for name, c := range map[string]struct {
		template string
		change   func(*x509.Certificate)
		want     string // path; empty: refused
	}{
		"the common name":            {cn, named("host-1.example.org"), "x509pop/host-1.example.org"},
		"a leading slash":            {"/" + cn, named("host-1"), "x509pop/host-1"},
		"the plugin's name":          {"{{ .PluginName }}/{{ .TrustDomain }}/{{ .Subject.CommonName }}", named("host-1"), "x509pop/example.org/host-1"},
		"two values":                 {"x509pop/{{ (index .Subject.Organization 0) | lower }}/{{ .Subject.CommonName }}", named("host-1"), "x509pop/acme/host-1"},
		"a value of a URI":           {"x509pop/{{ .URISanSelectors.rack }}", uris(t, "x509pop://example.org/rack/r7"), "x509pop/r7"},
		"functions":                  {`x509pop/{{ .Subject.CommonName | trimSuffix ".example.org" | trimPrefix "my " | replace " " "-" }}`, named("my host 1.example.org"), "x509pop/host-1"},
		"a hash":                     {"x509pop/{{ sha256sum .Subject.CommonName }}", named("a/b"), "x509pop/c14cddc033f64b9dea80ea675cf280a015e672516090a5626781153dc68fea11"},
		"a number":                   {"x509pop/{{ .SerialNumber }}", func(c *x509.Certificate) { c.SerialNumber = big.NewInt(300) }, "x509pop/300"},
		"the number in hexadecimal":  {"x509pop/{{ .SerialNumberHex }}", func(c *x509.Certificate) { c.SerialNumber = big.NewInt(300) }, "x509pop/012c"},
		"a variable":                 {"x509pop/{{ $x := .Subject.CommonName }}{{ $x }}", named("host-1"), "x509pop/host-1"},
		"a condition":                {"x509pop/{{ if .Subject.CommonName }}{{ .Subject.CommonName }}{{ else }}none{{ end }}", named(""), "x509pop/none"},
		"a dot within":               {"x509pop/a{{ .Subject.CommonName }}", named("."), "x509pop/a."},
		"a slash":                    {cn, named("a/b"), ""},
		"a slash first":              {cn, named("/a"), ""},
		"a slash last":               {cn, named("a/"), ""},
		"the level above":            {cn, named(".."), ""},
		"this level":                 {cn, named("."), ""},
		"another attestor":           {cn, named("../join_token/x"), ""},
		"the server":                 {cn, named("../../server"), ""},
		"a coded slash":              {cn, named("a%2fb"), ""},
		"a space":                    {cn, named("a b"), ""},
		"another alphabet":           {cn, named("hôst"), ""},
		"a NUL":                      {cn, named("a\x00b"), ""},
		"a template":                 {cn, named("{{ .Fingerprint }}"), ""},
		"nothing":                    {cn, named(""), ""},
		"nothing beside something":   {"x509pop/host-{{ .Subject.CommonName }}", named(""), ""},
		"too much":                   {cn, named(strings.Repeat("x", 2100)), ""},
		"a list":                     {"x509pop/{{ .DNSNames }}", named("a"), ""},
		"everything":                 {"x509pop/{{ . }}", named("a"), ""},
		"a slash by a function":      {`x509pop/{{ replace "-" "/" .Subject.CommonName }}`, named("a-b"), ""},
		"a slash by printing":        {`x509pop/{{ print .Subject.CommonName "/" .SerialNumberHex }}`, named("a"), ""},
		"a slash by a variable":      {`x509pop/{{ $x := .Subject.CommonName }}{{ $x }}`, named("a/b"), ""},
		"a slash in a range":         {`x509pop/{{ range .DNSNames }}{{ . }}{{ end }}`, func(c *x509.Certificate) { c.DNSNames = []string{"a/b"} }, ""},
		"a slash in a block":         {`x509pop/{{ with .Subject }}{{ block "b" . }}{{ .CommonName }}{{ end }}{{ end }}`, named("a/b"), ""},
		"a slash in another place":   {`{{ define "t" }}{{ if true }}{{ . }}{{ end }}{{ end }}x509pop/{{ template "t" .Subject.CommonName }}`, named("a/b"), ""},
		"a slash in a URI's value":   {"x509pop/{{ .URISanSelectors.rack }}", uris(t, "x509pop://example.org/rack/a/b"), ""},
		"a URI that is not there":    {"x509pop/{{ .URISanSelectors.rack }}", uris(t, "x509pop://example.org/row/r7"), ""},
		"an SVID's path without one": {"x509pop/{{ .SVIDPathTrimmed }}", named("a"), ""},
		"a value for the attestor":   {"{{ .Subject.CommonName }}/{{ .Fingerprint }}", named("join_token"), ""},
	} {
		// An agent's path is found out before the node is challenged.
		s := newServerOrNil(x509pop.ServerConfig{CABundlePath: ca, AgentPathTemplate: c.template})
		id := root.node(t, c.change)
		if c.want == "" {
			if s == nil {
				continue // refused as early as can be
			}
			if evidence, err := s.Verify(t.Context(), id.payload(t), unasked(t)); err == nil {
				t.Errorf("%s: path is %s", name, evidence.Path)
			}
			continue
		}
		if s == nil {
			t.Errorf("%s: the template is refused", name)
			continue
		}
		if evidence := mustAttest(t, s, id.agent(t)); evidence.Path != c.want {
			t.Errorf("%s: path is %s, want %s", name, evidence.Path, c.want)
		}
	}
}

func named(cn string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.Subject = pkix.Name{Organization: []string{"ACME"}, CommonName: cn}
	}
}

func newServerOrNil(c x509pop.ServerConfig) *x509pop.Server {
	s, err := x509pop.New(c, x509pop.Options{TrustDomain: td, Now: at(now)})
	if err != nil {
		return nil
	}
	return s
}

func TestARefusedValueIsNamed(t *testing.T) {
	root := newRoot(t, "root")
	s := newServer(t, x509pop.ServerConfig{CABundlePath: bundle(t, root), AgentPathTemplate: "x509pop/{{ .Subject.CommonName }}"})
	for cn, want := range map[string]string{
		"":    "its .Subject.CommonName is empty",
		"a/b": `its .Subject.CommonName is "a/b", which cannot be part of a SPIFFE ID`,
	} {
		_, err := s.Verify(t.Context(), root.node(t, named(cn)).payload(t), unasked(t))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error is %v, want one with %q", cn, err, want)
		}
	}
}

func TestATemplateThatNeverMakesAPathIsRefusedAtOnce(t *testing.T) {
	ca := bundle(t, newRoot(t, "root"))
	for template, want := range map[string]string{
		"x509pop/{{ .Subject.ComonName }}":    "ComonName",
		"x509pop/{{ .Fingerprnt }}":           "Fingerprnt",
		"x509pop/{{ nofunction . }}":          "nofunction",
		"x509pop/{{ .Subject.CommonName ":     "unclosed action",
		"join_token/{{ .Fingerprint }}":       "does not begin with x509pop/",
		"/cn/{{ .Subject.CommonName }}":       "does not begin with x509pop/",
		"x509popx/{{ .Fingerprint }}":         "does not begin with x509pop/",
		"//x509pop/{{ .Fingerprint }}":        "empty",
		"x509pop/../{{ .Fingerprint }}":       "dot segments",
		"x509pop/":                            "trailing slash",
		"x509pop":                             "does not begin with x509pop/",
		"x509pop//{{ .Fingerprint }}":         "empty",
		"x509pop/{{ .Fingerprint }}\n":        "characters",
		"x509pop/" + strings.Repeat("x", 3e3): "longer than 2048",
		"x509pop/" + strings.Repeat("x", 5e3): "the most is 4096",
	} {
		_, err := x509pop.New(x509pop.ServerConfig{CABundlePath: ca, AgentPathTemplate: template}, x509pop.Options{TrustDomain: td})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: error is %v, want one with %q", template, err, want)
		}
	}
}

// fixed is an identity whose files stay for a whole fuzz run.
func fixed(f *testing.F) (*identity, *identity, *x509pop.Server) {
	root := newRoot(f, "root")
	id := root.intermediate(f, "middle").node(f, nil)
	return root, id, trusting(f, root)
}

func FuzzPayload(f *testing.F) {
	_, id, s := fixed(f)
	f.Add(id.payload(f))
	f.Add([]byte(`{"certificates":["AAAA",null]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		evidence, err := s.Verify(t.Context(), data, func(_ context.Context, challenge []byte) ([]byte, error) {
			if !strings.Contains(string(challenge), `"nonce":"`) {
				t.Errorf("challenge is %s", challenge)
			}
			return nil, context.Canceled
		})
		if err == nil {
			t.Errorf("admitted without a signature: %+v", evidence)
		}
	})
}

func FuzzResponse(f *testing.F) {
	_, id, s := fixed(f)
	proof := id.payload(f)
	challenge := message{"ecdsa_signature": {"nonce": make([]byte, 32)}}.bytes(f)
	f.Add(respond(f, id.key, challenge).bytes(f))
	f.Add([]byte(`{"rsa_signature":{"nonce":"AAAA","signature":""}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if evidence, err := s.Verify(t.Context(), proof, func(context.Context, []byte) ([]byte, error) { return data, nil }); err == nil {
			t.Errorf("admitted without the key: %+v", evidence)
		}
	})
}

func FuzzChallenge(f *testing.F) {
	_, id, _ := fixed(f)
	agent := id.agent(f)
	f.Add(message{"ecdsa_signature": {"nonce": make([]byte, 32)}}.bytes(f))
	f.Add([]byte(`{"rsa_signature":{"nonce":"AAAA"},"ecdsa_signature":null}`))
	f.Add([]byte(`{"ECDSA_signature":{"Nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := agent.Proof(t.Context()); err != nil {
			t.Fatal(err)
		}
		response, err := agent.Respond(t.Context(), data)
		if err != nil {
			return
		}
		var c struct { // whose names are read in upper and lower case
			ECDSA *struct{ Nonce []byte } `json:"ecdsa_signature"`
		}
		if err := json.Unmarshal(data, &c); err != nil {
			t.Fatal(err)
		}
		m := parse(t, response)["ecdsa_signature"]
		r, s := new(big.Int).SetBytes(m["r"]), new(big.Int).SetBytes(m["s"])
		if len(c.ECDSA.Nonce) != 32 || len(m["nonce"]) != 32 || !ecdsa.Verify(id.key.Public().(*ecdsa.PublicKey), hash(c.ECDSA.Nonce, m["nonce"]), r, s) {
			t.Errorf("challenge %s is answered by %s", data, response)
		}
	})
}

func FuzzCommonName(f *testing.F) {
	root := newRoot(f, "root")
	key := newKey(f)
	s := newServer(f, x509pop.ServerConfig{CABundlePath: bundle(f, root), AgentPathTemplate: "x509pop/a/{{ .Subject.CommonName }}/b"})
	for _, name := range []string{"host-1", "../..", "a/b", "{{.}}", "\x00"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(1), KeyUsage: x509.KeyUsageDigitalSignature, NotBefore: now, NotAfter: now,
			Subject: pkix.Name{CommonName: name},
		}, root.cert, key.Public(), root.key)
		if err != nil {
			t.Skip()
		}
		evidence, err := s.Verify(t.Context(), payload(t, der), func(_ context.Context, challenge []byte) ([]byte, error) {
			return respond(t, key, challenge).bytes(t), nil
		})
		if err != nil {
			return
		}
		if evidence.Path != "x509pop/a/"+name+"/b" || strings.Count(evidence.Path, "/") != 3 || filepath.Clean(evidence.Path) != evidence.Path {
			t.Errorf("name %q makes path %q", name, evidence.Path)
		}
	})
}
