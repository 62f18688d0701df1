package sshpop_test

import (
	"bytes"
	"context"
	"crypto/dsa" //lint:ignore SA1019 it must be refused
	"crypto/rand"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/hallmark-id/hallmark/attestors/sshpop"
)

// answering answers one challenge.
func answering(t testing.TB, respond func(challenge []byte) []byte) func(context.Context, []byte) ([]byte, error) {
	asked := false
	return func(_ context.Context, challenge []byte) ([]byte, error) {
		if asked {
			t.Error("the node is challenged twice")
		}
		asked = true
		return respond(challenge), nil
	}
}

func TestAReplayedResponseIsRefused(t *testing.T) {
	ca, key := ed(t), ed(t)
	s := trusting(t, ca.PublicKey())
	proof := payload(t, certify(t, ca, key.PublicKey(), nil).Marshal())
	var seen []byte
	if _, err := s.Verify(t.Context(), proof, answering(t, func(c []byte) []byte {
		seen = respond(t, key, c).bytes(t)
		return seen
	})); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context(), proof, answering(t, func([]byte) []byte { return seen })); err == nil {
		t.Error("a replayed response is accepted")
	}
}

func TestAWrongResponseIsRefused(t *testing.T) {
	ca, key, rs, other := ed(t), ed(t), rsaKey(t, 2048), ed(t)
	s := trusting(t, ca.PublicKey())
	for name, c := range map[string]struct {
		key     ssh.Signer // of the certificate
		respond func(challenge []byte) []byte
	}{
		"another key":            {key, func(c []byte) []byte { return respond(t, other, c).bytes(t) }},
		"a key of another kind":  {key, func(c []byte) []byte { return respond(t, rs, c).bytes(t) }},
		"the authority's key":    {key, func(c []byte) []byte { return respond(t, ca, c).bytes(t) }},
		"another server's nonce": {key, func([]byte) []byte { return respond(t, key, []byte(`{"Nonce": "AAAA"}`)).bytes(t) }},
		"another node's nonce": {key, func(c []byte) []byte {
			a := respond(t, key, c)
			a.Nonce[0] ^= 1
			return a.bytes(t)
		}},
		"the nonces unhashed": {key, func(c []byte) []byte {
			own := make([]byte, 32)
			signature, err := key.Sign(rand.Reader, append(nonceOf(t, c), own...))
			if err != nil {
				t.Fatal(err)
			}
			return (&answer{own, signature}).bytes(t)
		}},
		"the nonces exchanged": {key, func(c []byte) []byte {
			own := make([]byte, 32)
			signature, err := key.Sign(rand.Reader, hash(own, nonceOf(t, c)))
			if err != nil {
				t.Fatal(err)
			}
			return (&answer{own, signature}).bytes(t)
		}},
		"a shorter nonce": {key, func(c []byte) []byte {
			signature, err := key.Sign(rand.Reader, hash(nonceOf(t, c), nil))
			if err != nil {
				t.Fatal(err)
			}
			return (&answer{nil, signature}).bytes(t)
		}},
		"a longer nonce": {key, func(c []byte) []byte {
			own := make([]byte, 33)
			signature, err := key.Sign(rand.Reader, hash(nonceOf(t, c), own))
			if err != nil {
				t.Fatal(err)
			}
			return (&answer{own, signature}).bytes(t)
		}},
		"another algorithm's name": {rs, func(c []byte) []byte {
			a := respond(t, rs, c)
			a.Signature.Format = "rsa-sha2-512"
			return a.bytes(t)
		}},
		"an unknown algorithm": {rs, func(c []byte) []byte {
			a := respond(t, rs, c)
			a.Signature.Format = "none"
			return a.bytes(t)
		}},
		"a signature that goes on": {key, func(c []byte) []byte {
			a := respond(t, key, c)
			a.Signature.Rest = []byte{1}
			return a.bytes(t)
		}},
		"half a signature": {key, func(c []byte) []byte {
			a := respond(t, key, c)
			a.Signature.Blob = a.Signature.Blob[:32]
			return a.bytes(t)
		}},
		"an empty signature": {key, func([]byte) []byte { return (&answer{make([]byte, 32), &ssh.Signature{}}).bytes(t) }},
		"no signature":       {key, func([]byte) []byte { return (&answer{make([]byte, 32), nil}).bytes(t) }},
		"the challenge":      {key, func(c []byte) []byte { return c }},
		"nothing":            {key, func([]byte) []byte { return nil }},
		"null":               {key, func([]byte) []byte { return []byte("null") }},
		"no object":          {key, func([]byte) []byte { return []byte("[1]") }},
		"a trailing letter":  {key, func(c []byte) []byte { return append(respond(t, key, c).bytes(t), 'x') }},
		"far too much":       {key, func(c []byte) []byte { return append(respond(t, key, c).bytes(t), strings.Repeat(" ", 1<<20)...) }},
	} {
		asked := false
		evidence, err := s.Verify(t.Context(), payload(t, certify(t, ca, c.key.PublicKey(), nil).Marshal()), answering(t, func(challenge []byte) []byte {
			asked = true
			return c.respond(challenge)
		}))
		if err == nil || evidence != nil || !asked {
			t.Errorf("%s: admitted, or not challenged: %v", name, err)
		}
	}
}

// TestACertificateThatProvesNothingIsRefused goes through certificates whose
// holders must not even be challenged.
func TestACertificateThatProvesNothingIsRefused(t *testing.T) {
	ca, rsaCA, key := ed(t), rsaKey(t, 2048), ed(t)
	s := trusting(t, ca.PublicKey(), rsaCA.PublicKey())
	public := key.PublicKey()
	of := func(change func(*ssh.Certificate)) *ssh.Certificate { return certify(t, ca, public, change) }
	// after changes a certificate that was signed.
	after := func(change func(*ssh.Certificate)) *ssh.Certificate {
		c := of(nil)
		change(c)
		return c
	}
	impostor := func() *ssh.Certificate { // claims the authority's key
		c := certify(t, ed(t), public, nil)
		c.SignatureKey = ca.PublicKey()
		return c
	}
	nested := func() *ssh.Certificate { // signed by what an authority has certified
		middle := ed(t)
		c := certify(t, middle, public, nil)
		c.SignatureKey = certify(t, ca, middle.PublicKey(), nil)
		return c
	}
	var dsaKey dsa.PrivateKey
	if err := dsa.GenerateParameters(&dsaKey.Parameters, rand.Reader, dsa.L1024N160); err != nil {
		t.Fatal(err)
	}
	if err := dsa.GenerateKey(&dsaKey, rand.Reader); err != nil {
		t.Fatal(err)
	}
	sha1 := certify(t, signerOf(t, rsaCA, "ssh-rsa"), public, nil)
	many := make([]string, 101)
	for i := range many {
		many[i] = "h"
	}
	for name, c := range map[string]struct {
		cert *ssh.Certificate
		want string
	}{
		"another authority's":           {certify(t, ed(t), public, nil), "not that of an authority"},
		"self-signed":                   {certify(t, key, public, nil), "not that of an authority"},
		"with the authority's name":     {impostor(), "does not verify"},
		"of a certified authority":      {nested(), "malformed certificate"},
		"expired":                       {of(func(c *ssh.Certificate) { c.ValidBefore = uint64(now.Unix()) }), "expired"},
		"expired long ago":              {of(func(c *ssh.Certificate) { c.ValidAfter, c.ValidBefore = 0, 1 }), "expired"},
		"not yet valid":                 {of(func(c *ssh.Certificate) { c.ValidAfter = uint64(now.Add(time.Second).Unix()) }), "not yet valid"},
		"valid from beyond all time":    {of(func(c *ssh.Certificate) { c.ValidAfter = 1 << 63 }), "not yet valid"},
		"valid until beyond all time":   {of(func(c *ssh.Certificate) { c.ValidBefore = 1 << 63 }), "expired"},
		"a user's":                      {of(func(c *ssh.Certificate) { c.CertType = ssh.UserCert }), "not that of a host"},
		"of no type":                    {of(func(c *ssh.Certificate) { c.CertType = 0 }), "not that of a host"},
		"of every host":                 {of(func(c *ssh.Certificate) { c.ValidPrincipals = nil }), "names no host"},
		"of too many hosts":             {of(func(c *ssh.Certificate) { c.ValidPrincipals = many }), "names 101 hosts"},
		"with a critical option":        {of(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"force-command": "x"} }), "critical option"},
		"for some addresses":            {of(func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"source-address": "10.0.0.0/8"} }), "critical option"},
		"signed with SHA-1":             {sha1, "SHA-1"},
		"of a DSA key":                  {certify(t, ca, signer(t, &dsaKey).PublicKey(), nil), "not supported"},
		"of a short RSA key":            {certify(t, ca, rsaKey(t, 1024).PublicKey(), nil), "1024 bits"},
		"with another host":             {after(func(c *ssh.Certificate) { c.ValidPrincipals = []string{"host-2"} }), "does not verify"},
		"with another key":              {after(func(c *ssh.Certificate) { c.Key = ed(t).PublicKey() }), "does not verify"},
		"with a longer life":            {after(func(c *ssh.Certificate) { c.ValidBefore = ssh.CertTimeInfinity }), "does not verify"},
		"with a signature that goes on": {after(func(c *ssh.Certificate) { c.Signature.Rest = []byte{1} }), ""},
		"without a signature":           {after(func(c *ssh.Certificate) { c.Signature = &ssh.Signature{} }), ""},
	} {
		evidence, err := s.Verify(t.Context(), payload(t, c.cert.Marshal()), unasked(t))
		if err == nil || evidence != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

// signerOf makes a key sign with one algorithm only.
func signerOf(t testing.TB, key ssh.Signer, algorithm string) ssh.Signer {
	t.Helper()
	s, err := ssh.NewSignerWithAlgorithms(key.(ssh.AlgorithmSigner), []string{algorithm})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAMalformedPayloadIsRefused(t *testing.T) {
	ca := ed(t)
	s := trusting(t, ca.PublicKey())
	wire := certify(t, ca, ed(t).PublicKey(), nil).Marshal()
	good := string(payload(t, wire))
	for name, c := range map[string]struct{ payload, want string }{
		"nothing":         {"", "malformed"},
		"null":            {"null", "no certificate"},
		"an empty object": {"{}", "no certificate"},
		"not an object":   {"[]", "malformed"},
		"no base64":       {`{"Certificate": "?"}`, "malformed"},
		"a letter":        {`{"Certificate": "AAAA"}`, "malformed certificate"},
		"a bare key":      {string(payload(t, ca.PublicKey().Marshal())), "holds a bare key"},
		"half":            {string(payload(t, wire[:len(wire)/2])), "malformed certificate"},
		"one byte less":   {string(payload(t, wire[:len(wire)-1])), "malformed certificate"},
		"one byte more":   {string(payload(t, append(bytes.Clone(wire), 0))), "malformed certificate"},
		"trailing JSON":   {good + good, "malformed"},
		"far too much":    {good + strings.Repeat(" ", 64<<10), "the most is 65536"},
		"deep nesting":    {strings.Repeat(`{"Certificate":`, 4000), "malformed"},
		"a huge length":   {string(payload(t, append([]byte{0xff, 0xff, 0xff, 0xff}, wire...))), "malformed certificate"},
	} {
		_, err := s.Verify(t.Context(), []byte(c.payload), unasked(t))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %.200v, want one with %q", name, err, c.want)
		}
	}
}

func TestAValueOfACertificateCannotShapeThePath(t *testing.T) {
	ca, key := ed(t), ed(t)
	for _, template := range []string{"sshpop/{{ .Hostname }}", "sshpop/{{ .KeyId }}"} {
		s := newServer(t, sshpop.ServerConfig{CertAuthorities: []string{line(ca.PublicKey())}, AgentPathTemplate: template})
		for _, value := range []string{"", "a/b", "..", "../../join_token/x", "*", "a b", "hôst", "a\x00b", "{{ .Serial }}", strings.Repeat("x", 2100)} {
			cert := certify(t, ca, key.PublicKey(), func(c *ssh.Certificate) { c.ValidPrincipals, c.KeyId = []string{value}, value })
			if evidence, err := s.Verify(t.Context(), payload(t, cert.Marshal()), unasked(t)); err == nil {
				t.Errorf("%s: %q makes the path %s", template, value, evidence.Path)
			}
		}
	}
}

func FuzzPayload(f *testing.F) {
	ca := ed(f)
	s := trusting(f, ca.PublicKey())
	f.Add(certify(f, ca, ed(f).PublicKey(), nil).Marshal())
	f.Add(certify(f, ca, ec(f).PublicKey(), func(c *ssh.Certificate) { c.SignatureKey = ca.PublicKey() }).Marshal())
	f.Add(ca.PublicKey().Marshal())
	f.Fuzz(func(t *testing.T, wire []byte) {
		for _, data := range [][]byte{wire, payload(t, wire)} {
			evidence, err := s.Verify(t.Context(), data, func(context.Context, []byte) ([]byte, error) { return nil, context.Canceled })
			if err == nil {
				t.Errorf("admitted without a signature: %+v", evidence)
			}
		}
	})
}

func FuzzResponse(f *testing.F) {
	ca, key := ed(f), ec(f)
	s := trusting(f, ca.PublicKey())
	proof := payload(f, certify(f, ca, key.PublicKey(), nil).Marshal())
	f.Add(respond(f, key, []byte(`{"Nonce": "AAAA"}`)).bytes(f))
	f.Add([]byte(`{"Nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","Signature":{"Format":"ecdsa-sha2-nistp256","Blob":"AAAA"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if evidence, err := s.Verify(t.Context(), proof, func(context.Context, []byte) ([]byte, error) { return data, nil }); err == nil {
			t.Errorf("admitted without the key: %+v", evidence)
		}
	})
}

func FuzzChallenge(f *testing.F) {
	ca := authority(f, "ed25519")
	c := host(f, ca, "ed25519")
	agent, cert := sshpop.NewAgent(c), parseCert(f, c)
	f.Add([]byte(`{"Nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`))
	f.Add([]byte(`{"nonce":"AAAA","Nonce":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := agent.Proof(t.Context()); err != nil {
			t.Fatal(err)
		}
		out, err := agent.Respond(t.Context(), data)
		if err != nil {
			return
		}
		var a answer
		if err := json.Unmarshal(out, &a); err != nil {
			t.Fatal(err)
		}
		if len(nonceOf(t, data)) != 32 || len(a.Nonce) != 32 || cert.Key.Verify(hash(nonceOf(t, data), a.Nonce), a.Signature) != nil {
			t.Errorf("challenge %s is answered by %s", data, out)
		}
	})
}
