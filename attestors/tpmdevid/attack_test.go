package tpmdevid_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors/tpm"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestAPayloadThatProvesNothingIsRefused goes through payloads whose senders must
// not even be challenged.
func TestAPayloadThatProvesNothingIsRefused(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	device := maker.NewTPM(t)
	s := newServer(t, ca.bundle(t), maker.CA)
	config := ca.provision(t, device, devIDTemplate(tpm2.TPMAlgRSA), "")
	good := unmarshal[payload](t, proof(t, newAgent(t, config)))
	another := unmarshal[payload](t, proof(t, newAgent(t, ca.provision(t, device, devIDTemplate(tpm2.TPMAlgECC), ""))))
	stranger := unmarshal[payload](t, proof(t, newAgent(t, ca.provision(t, harness.NewTPMMaker(t).NewTPM(t), devIDTemplate(tpm2.TPMAlgECC), ""))))
	leaf, err := x509.ParseCertificate(good.DevIDCert[0])
	if err != nil {
		t.Fatal(err)
	}

	// An attestation key of the node's own making, which signs as asked.
	software, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	area := func(change func(*tpm2.TPMTPublic)) []byte {
		a := tpm.RSAAKTemplate
		change(&a)
		a.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: software.N.Bytes()})
		return tpm2.Marshal(a)
	}
	forged := func(said []byte) []byte {
		digest := sha256.Sum256(said)
		signature, err := rsa.SignPKCS1v15(rand.Reader, software, crypto.SHA256, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return append([]byte{0, 0x14, 0, 0x0b, 1, 0}, signature...)
	}
	// saying changes a payload into one of that key, which says what it is told.
	saying := func(change func(*tpm2.TPMTPublic), said []byte) func(*payload) {
		return func(p *payload) {
			p.AKPub, p.CertifiedDevID, p.CertificationSignature = area(change), said, forged(said)
		}
	}
	certified := func(name []byte, change func(*tpm2.TPMSAttest)) []byte {
		a := tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestCertify,
			Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: tpm2.TPM2BName{Buffer: name}})}
		change(&a)
		return tpm2.Marshal(a)
	}
	devID, err := tpm.ParseArea(good.DevIDPub)
	if err != nil {
		t.Fatal(err)
	}
	asIs := func(*tpm2.TPMTPublic) {}
	unchanged := func(*tpm2.TPMSAttest) {}
	signed := func(public crypto.PublicKey, change func(*x509.Certificate)) func(*payload) {
		return func(p *payload) { p.DevIDCert = [][]byte{ca.certify(t, public, change).Raw} }
	}
	attributes := func(clear uint32) func(*payload) { // TPMA_OBJECT of the DevID key
		return func(p *payload) {
			p.DevIDPub = bytes.Clone(p.DevIDPub)
			for i := range 4 {
				p.DevIDPub[4+i] &^= byte(clear >> (24 - 8*i))
			}
		}
	}
	withRSA := func(bits uint) crypto.PublicKey {
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: 65537}
	}

	for name, c := range map[string]struct {
		change func(*payload)
		want   string
	}{
		"no certificate":             {func(p *payload) { p.DevIDCert = nil }, "no DevID certificate"},
		"too many certificates":      {func(p *payload) { p.DevIDCert = make([][]byte, 11) }, "holds 11 certificates"},
		"a malformed certificate":    {func(p *payload) { p.DevIDCert = [][]byte{{1}} }, "certificate 1 of the chain is malformed"},
		"of another authority":       {func(p *payload) { p.DevIDCert = [][]byte{newAuthority(t).certify(t, leaf.PublicKey, nil).Raw} }, "does not lead to an authority"},
		"expired":                    {signed(leaf.PublicKey, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "expired"},
		"not yet valid":              {signed(leaf.PublicKey, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), "not yet valid"},
		"the authority's":            {func(p *payload) { p.DevIDCert = [][]byte{ca.cert.Raw} }, "that of a certificate authority"},
		"not for signatures":         {signed(leaf.PublicKey, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), "digitalSignature"},
		"of a key in software":       {signed(newKey(t).Public(), nil), "not of the key that the TPM holds"},
		"of a short key":             {signed(withRSA(1024), nil), "1024 bits"},
		"of a huge key":              {signed(withRSA(16384), nil), "16384 bits"},
		"another DevID key's area":   {func(p *payload) { p.DevIDPub = another.DevIDPub }, "not of the key that the TPM holds"},
		"a key that may leave":       {attributes(1 << 1), "may leave it"},
		"a key that was imported":    {attributes(1 << 5), "may leave it"},
		"a key of another parent":    {attributes(1 << 4), "may leave it"},
		"a key that does not sign":   {attributes(1 << 18), "not one that signs"},
		"half an area":               {func(p *payload) { p.DevIDPub = p.DevIDPub[:len(p.DevIDPub)/2] }, "cut off"},
		"an area that goes on":       {func(p *payload) { p.DevIDPub = append(bytes.Clone(p.DevIDPub), 0) }, "1 bytes after its end"},
		"another maker's TPM":        {func(p *payload) { p.EKCert, p.EKPub = stranger.EKCert, stranger.EKPub }, "does not lead to an authority"},
		"no endorsement":             {func(p *payload) { p.EKCert = nil }, "malformed"},
		"a DevID for an endorsement": {func(p *payload) { p.EKCert = p.DevIDCert[0] }, "does not say that it is of an endorsement key"},
		"another endorsement key":    {func(p *payload) { p.EKPub = stranger.EKPub }, "endorsement key is not what its certificate"},
		"no endorsement key":         {func(p *payload) { p.EKPub = nil }, "endorsement key is not what its certificate"},
		"another key's certification": {func(p *payload) {
			p.CertifiedDevID, p.CertificationSignature = another.CertifiedDevID, another.CertificationSignature
		}, "certifies another key"},
		"another TPM's certification": {func(p *payload) {
			p.CertifiedDevID, p.CertificationSignature = stranger.CertifiedDevID, stranger.CertificationSignature
		}, "not signed with the attestation key"},
		"an unsigned certification": {func(p *payload) { p.CertificationSignature = nil }, "cut off"},
		"a signature that goes on":  {func(p *payload) { p.CertificationSignature = append(bytes.Clone(p.CertificationSignature), 0) }, "cut off, or goes on"},
		"a signature by another way": {func(p *payload) {
			p.CertificationSignature = bytes.Clone(p.CertificationSignature)
			p.CertificationSignature[1] = 0x16
		}, "RSASSA"},
		"another's attestation key": {func(p *payload) { p.AKPub = stranger.AKPub }, "not signed with the attestation key"},
		"no attestation key":        {func(p *payload) { p.AKPub = nil }, "cut off"},
		"an ECC attestation key":    {func(p *payload) { p.AKPub = another.DevIDPub }, "not RSA"},
		"not restricted":            {saying(func(a *tpm2.TPMTPublic) { a.ObjectAttributes.Restricted = false }, certified(devID.Name, unchanged)), "restricted to signing"},
		"not fixedTPM":              {saying(func(a *tpm2.TPMTPublic) { a.ObjectAttributes.FixedTPM = false }, certified(devID.Name, unchanged)), "restricted to signing"},
		"used by a policy": {saying(func(a *tpm2.TPMTPublic) {
			a.ObjectAttributes.AdminWithPolicy, a.AuthPolicy = true, tpm2.RSAEKTemplate.AuthPolicy
		}, certified(devID.Name, unchanged)), "without a policy"},
		"not said by a TPM":            {saying(asIs, certified(devID.Name, func(a *tpm2.TPMSAttest) { a.Magic = 1 })), "not said by a TPM"},
		"a quote":                      {saying(asIs, quote()), "certifies no key"},
		"a certification cut off":      {saying(asIs, certified(devID.Name, unchanged)[:40]), "cut off"},
		"a certification that goes on": {saying(asIs, append(certified(devID.Name, unchanged), 0)), "1 bytes after its end"},
		"a certification of nothing":   {saying(asIs, certified(nil, unchanged)), "certifies another key"},
	} {
		p := good
		c.change(&p)
		evidence, err := s.Verify(t.Context(), marshal(t, p), unasked(t))
		if err == nil || evidence != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
	for name, data := range map[string]string{
		"nothing": "", "null": "null", "no object": "[]", "no base64": `{"DevIDCert": ["?"]}`, "a string": `{"DevIDCert": "AAAA"}`,
		"trailing JSON": string(marshal(t, good)) + "{}", "far too much": string(marshal(t, good)) + strings.Repeat(" ", 64<<10),
	} {
		if _, err := s.Verify(t.Context(), []byte(data), unasked(t)); err == nil {
			t.Errorf("%s: admitted", name)
		}
	}

	// What a key in software says of itself can be made to look right. It is in
	// no TPM, and so no TPM gives out its secret.
	p := good
	saying(asIs, certified(devID.Name, unchanged))(&p)
	d := open(t, device)
	defer d.Close()
	ek, err := d.LoadEndorsementKey(tpm.RSA2048, "")
	if err != nil {
		t.Fatal(err)
	}
	ak := loaded(t, d, tpm.RSAAKTemplate)
	defer d.Flush(ak)
	if _, err := s.Verify(t.Context(), marshal(t, p), func(_ context.Context, data []byte) ([]byte, error) {
		c := unmarshal[challenge](t, data)
		if _, err := d.Activate(ek, ak, "", tpm.Credential{IDObject: c.CredActivation.Credential, Secret: c.CredActivation.Secret}); err == nil {
			t.Error("the TPM has activated a credential for a key in software")
		}
		return marshal(t, response{CredActivation: make([]byte, 32)}), nil
	}); err == nil {
		t.Error("an attestation key in software is believed")
	}
}

func quote() []byte {
	return tpm2.Marshal(tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote,
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{})})
}

func TestAWrongResponseIsRefused(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	device := maker.NewTPM(t)
	s := newServer(t, ca.bundle(t), maker.CA)
	agent := newAgent(t, ca.provision(t, device, devIDTemplate(tpm2.TPMAlgECC), ""))
	var seen []byte // by an earlier server
	if _, err := s.Verify(t.Context(), proof(t, agent), func(ctx context.Context, c []byte) (answer []byte, err error) {
		seen, err = agent.Respond(ctx, c)
		return seen, err
	}); err != nil {
		t.Fatal(err)
	}
	// answering has the real node answer, and changes that.
	answering := func(change func(challenge, *response)) func(context.Context, []byte) ([]byte, error) {
		return func(ctx context.Context, data []byte) ([]byte, error) {
			answer, err := agent.Respond(ctx, data)
			if err != nil {
				return nil, err
			}
			r := unmarshal[response](t, answer)
			change(unmarshal[challenge](t, data), &r)
			return marshal(t, r), nil
		}
	}
	saying := func(text string) func(context.Context, []byte) ([]byte, error) {
		return func(context.Context, []byte) ([]byte, error) { return []byte(text), nil }
	}
	const key, secret = "does not have the private key", "has not activated"
	for name, c := range map[string]struct {
		respond func(context.Context, []byte) ([]byte, error)
		want    string // empty: admitted
	}{
		"as it should be":       {answering(func(challenge, *response) {}), ""},
		"replayed":              {func(context.Context, []byte) ([]byte, error) { return seen, nil }, key},
		"an earlier secret":     {answering(func(_ challenge, r *response) { r.CredActivation = unmarshal[response](t, seen).CredActivation }), secret},
		"an earlier signature":  {answering(func(_ challenge, r *response) { r.DevID = unmarshal[response](t, seen).DevID }), key},
		"half the secret":       {answering(func(_ challenge, r *response) { r.CredActivation = r.CredActivation[:16] }), secret},
		"a longer secret":       {answering(func(_ challenge, r *response) { r.CredActivation = append(r.CredActivation, 0) }), secret},
		"no secret":             {answering(func(_ challenge, r *response) { r.CredActivation = nil }), secret},
		"the credential":        {answering(func(c challenge, r *response) { r.CredActivation = c.CredActivation.Credential }), secret},
		"another key's":         {answering(func(c challenge, r *response) { r.DevID = signWith(t, newKey(t), c.DevID) }), key},
		"half a signature":      {answering(func(_ challenge, r *response) { r.DevID = r.DevID[:20] }), key},
		"no signature":          {answering(func(_ challenge, r *response) { r.DevID = nil }), key},
		"the nonce":             {answering(func(c challenge, r *response) { r.DevID = c.DevID }), key},
		"the secret, signed by": {answering(func(_ challenge, r *response) { r.DevID, r.CredActivation = r.CredActivation, r.DevID }), key},
		"nothing":               {saying(""), "malformed"},
		"null":                  {saying("null"), key},
		"no object":             {saying("[]"), "malformed"},
		"far too much":          {saying(strings.Repeat(" ", 1<<20)), "the most is 8192"},
	} {
		evidence, err := s.Verify(t.Context(), proof(t, agent), c.respond)
		if (err == nil) != (c.want == "") || err != nil && (evidence != nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

func signWith(t testing.TB, key *ecdsa.PrivateKey, nonce []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(nonce)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

// TestTheKeysOfTwoTPMsMakeNoNode has one TPM vouch for the key of another.
func TestTheKeysOfTwoTPMsMakeNoNode(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	one, two := maker.NewTPM(t), maker.NewTPM(t)
	s := newServer(t, ca.bundle(t), maker.CA)
	a := newAgent(t, ca.provision(t, one, devIDTemplate(tpm2.TPMAlgECC), ""))
	p := unmarshal[payload](t, proof(t, a))
	d := open(t, two)
	defer d.Close()
	var err error
	if p.EKCert, err = d.EndorsementCertificate(tpm.RSA2048); err != nil {
		t.Fatal(err)
	}
	ek, err := d.LoadEndorsementKey(tpm.RSA2048, "")
	if err != nil {
		t.Fatal(err)
	}
	p.EKPub = tpm2.Marshal(*ek.Public)
	if _, err := s.Verify(t.Context(), marshal(t, p), a.Respond); err == nil || !strings.Contains(err.Error(), "activate the credential") {
		t.Errorf("got %v", err)
	}
}

func FuzzPayload(f *testing.F) {
	maker, ca := harness.NewTPMMaker(f), newAuthority(f)
	agent := newAgent(f, ca.provision(f, maker.NewTPM(f), devIDTemplate(tpm2.TPMAlgECC), ""))
	s := newServer(f, ca.bundle(f), maker.CA)
	good := unmarshal[payload](f, proof(f, agent))
	f.Add(good.DevIDPub, good.AKPub, good.CertifiedDevID, good.CertificationSignature)
	f.Fuzz(func(t *testing.T, devID, ak, certified, signature []byte) {
		p := good
		p.DevIDPub, p.AKPub, p.CertifiedDevID, p.CertificationSignature = devID, ak, certified, signature
		for _, data := range [][]byte{marshal(t, p), devID} {
			if evidence, err := s.Verify(t.Context(), data, func(context.Context, []byte) ([]byte, error) { return nil, context.Canceled }); err == nil {
				t.Errorf("admitted without an answer: %+v", evidence)
			}
		}
	})
}

func FuzzResponse(f *testing.F) {
	maker, ca := harness.NewTPMMaker(f), newAuthority(f)
	agent := newAgent(f, ca.provision(f, maker.NewTPM(f), devIDTemplate(tpm2.TPMAlgECC), ""))
	s := newServer(f, ca.bundle(f), maker.CA)
	p := proof(f, agent)
	f.Add(marshal(f, response{make([]byte, 70), make([]byte, 32)}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if evidence, err := s.Verify(t.Context(), p, func(context.Context, []byte) ([]byte, error) { return data, nil }); err == nil {
			t.Errorf("admitted by %s: %+v", data, evidence)
		}
	})
}

func FuzzChallenge(f *testing.F) {
	maker, ca := harness.NewTPMMaker(f), newAuthority(f)
	agent := newAgent(f, ca.provision(f, maker.NewTPM(f), devIDTemplate(tpm2.TPMAlgECC), ""))
	f.Add([]byte(`{"DevID":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","CredActivation":{"Credential":"AAAA","Secret":"AAAA"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		proof(t, agent)
		if answer, err := agent.Respond(t.Context(), data); err == nil {
			t.Errorf("challenge %s is answered by %s", data, answer)
		}
	})
}
