package tpmek_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/hallmark-id/hallmark/attestors/tpm"
	"github.com/hallmark-id/hallmark/attestors/tpmek"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestAKeyThatIsNoAttestationKeyActivatesNothing has a real TPM, with a real
// endorsement key, decrypt credentials for keys of the node's choice.
func TestAKeyThatIsNoAttestationKeyActivatesNothing(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	d := open(t, maker.NewTPM(t))
	ek, err := d.LoadEndorsementKey(tpm.RSA2048, "")
	if err != nil {
		t.Fatal(err)
	}
	ekPublic, err := tpm.PublicKey(ek.Public)
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*tpm2.TPMTPublic)) tpm2.TPMTPublic {
		area := tpm.AKTemplate
		change(&area)
		return area
	}
	for name, c := range map[string]struct {
		area tpm2.TPMTPublic
		good bool
	}{
		"as it should be": {tpm.AKTemplate, true},
		"not restricted":  {with(func(a *tpm2.TPMTPublic) { a.ObjectAttributes.Restricted = false }), false},
		"not fixedTPM":    {with(func(a *tpm2.TPMTPublic) { a.ObjectAttributes.FixedTPM, a.ObjectAttributes.FixedParent = false, false }), false},
		"used by policy": {with(func(a *tpm2.TPMTPublic) {
			a.ObjectAttributes.AdminWithPolicy, a.AuthPolicy = true, tpm2.RSAEKTemplate.AuthPolicy
		}), false},
		"of another hash": {with(func(a *tpm2.TPMTPublic) {
			a.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
				Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA384})},
				CurveID: tpm2.TPMECCNistP256,
			})
		}), false},
		"with another attribute": {with(func(a *tpm2.TPMTPublic) { a.ObjectAttributes.NoDA = false }), false},
	} {
		ak, err := d.CreatePrimary(tpm2.TPMRHNull, "", c.area)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		public, err := tpm.PublicKey(ak.Public)
		if err != nil {
			t.Fatal(err)
		}
		// The server knows no more of the key than this.
		expected, err := tpm.AKName(public.(*ecdsa.PublicKey))
		if err != nil {
			t.Fatal(err)
		}
		credential, secret, err := tpm.NewCredential(ekPublic, expected)
		if err != nil {
			t.Fatal(err)
		}
		got, err := d.Activate(ek, ak, "", credential)
		if good := err == nil && bytes.Equal(got, secret); good != c.good {
			t.Errorf("%s: activated %v: %v", name, good, err)
		}
		d.Flush(ak)
	}

	// A key in software, of which the TPM is told that it were one of its own.
	software, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	expected, err := tpm.AKName(&software.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := software.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	area := with(func(a *tpm2.TPMTPublic) {
		a.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: raw[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[33:]},
		})
	})
	loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(area), Hierarchy: tpm2.TPMRHNull}.Execute(d)
	if err != nil {
		t.Fatal(err) // the TPM takes the public half
	}
	defer tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(d)
	if !bytes.Equal(loaded.Name.Buffer, expected) {
		t.Fatal("the key has another name")
	}
	credential, _, err := tpm.NewCredential(ekPublic, expected)
	if err != nil {
		t.Fatal(err)
	}
	got, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle: tpm2.AuthHandle{Handle: 0x81010001, Name: nameOf(t, ek), Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16,
			func(d transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
				_, err := tpm2.PolicySecret{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, PolicySession: session, NonceTPM: nonce}.Execute(d)
				return err
			})},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: credential.IDObject},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: credential.Secret},
	}.Execute(d)
	if !errors.Is(err, tpm2.TPMRCAuthUnavailable) {
		t.Errorf("a key that is not in the TPM activated %+v: %v", got, err)
	}
}

func nameOf(t testing.TB, key *tpm.Key) tpm2.TPM2BName {
	t.Helper()
	name, err := tpm2.ObjectName(key.Public)
	if err != nil {
		t.Fatal(err)
	}
	return *name
}

func TestAnotherTPMsKeyActivatesNothing(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	one, two := maker.NewTPM(t), maker.NewTPM(t)
	s := newServer(t, tpmek.ServerConfig{EndorsementCAPath: maker.CA})
	a, b := newAgent(t, tpmek.AgentConfig{Device: one.Socket}), newAgent(t, tpmek.AgentConfig{Device: two.Socket})
	proofs := make([]payload, 2)
	for i, agent := range []*tpmek.Agent{a, b} {
		proof, err := agent.Proof(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		proofs[i] = unmarshal[payload](t, proof)
	}
	mixed := marshal(t, payload{EK: proofs[0].EK, Cert: proofs[0].Cert, AK: proofs[1].AK})
	for name, agent := range map[string]*tpmek.Agent{"the endorsement key's TPM": a, "the attestation key's TPM": b} {
		if _, err := s.Verify(t.Context(), mixed, agent.Respond); err == nil || !strings.Contains(err.Error(), "activate the credential") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAReplayedResponseIsRefused(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	agent := newAgent(t, tpmek.AgentConfig{Device: maker.NewTPM(t).Socket})
	s := newServer(t, tpmek.ServerConfig{EndorsementCAPath: maker.CA, PCRs: []uint{7}})
	proof, err := agent.Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var seen []byte
	if _, err := s.Verify(t.Context(), proof, func(ctx context.Context, c []byte) ([]byte, error) {
		seen, err = agent.Respond(ctx, c)
		return seen, err
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context(), proof, func(context.Context, []byte) ([]byte, error) { return seen, nil }); err == nil || !strings.Contains(err.Error(), "does not hold the secret") {
		t.Errorf("a replayed response: %v", err)
	}
}

// TestAWrongQuoteIsRefused has a TPM whose keys are known say what none would.
func TestAWrongQuoteIsRefused(t *testing.T) {
	t.Parallel()
	f := newForger(t)
	s := f.trusting(t, 0, 7)
	pcrs, vals := []uint{0, 7}, [][]byte{bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)}
	zero := [][]byte{make([]byte, 32), make([]byte, 32)}
	changed := func(change func(*tpm2.TPMSAttest)) func([]byte) []byte {
		return func(secret []byte) []byte {
			q := quote(secret, pcrs, vals)
			change(&q)
			return f.sign(t, tpm2.Marshal(q), vals)
		}
	}
	selecting := func(change func(*tpm2.TPMSQuoteInfo)) func([]byte) []byte {
		return changed(func(q *tpm2.TPMSAttest) {
			info, err := q.Attested.Quote()
			if err != nil {
				t.Fatal(err)
			}
			change(info)
			q.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, info)
		})
	}
	for name, c := range map[string]struct {
		respond func(secret []byte) []byte
		want    string // empty: admitted
	}{
		"as it should be":   {changed(func(*tpm2.TPMSAttest) {}), ""},
		"another secret":    {changed(func(q *tpm2.TPMSAttest) { q.ExtraData.Buffer = make([]byte, 32) }), "does not hold the secret"},
		"half the secret":   {changed(func(q *tpm2.TPMSAttest) { q.ExtraData.Buffer = q.ExtraData.Buffer[:16] }), "does not hold the secret"},
		"no secret":         {changed(func(q *tpm2.TPMSAttest) { q.ExtraData.Buffer = nil }), "does not hold the secret"},
		"not said by a TPM": {changed(func(q *tpm2.TPMSAttest) { q.Magic = 0xff544348 }), "not said by a TPM"},
		"a certification": {func(secret []byte) []byte {
			a := tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestCertify, ExtraData: tpm2.TPM2BData{Buffer: secret},
				Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{})}
			return f.sign(t, tpm2.Marshal(a), vals)
		}, "something else than a quote"},
		"the time": {func(secret []byte) []byte {
			a := tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestTime, ExtraData: tpm2.TPM2BData{Buffer: secret},
				Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestTime, &tpm2.TPMSTimeAttestInfo{})}
			return f.sign(t, tpm2.Marshal(a), vals)
		}, "something else than what it was asked for"},
		"other values": {func(secret []byte) []byte { return f.sign(t, tpm2.Marshal(quote(secret, pcrs, vals)), zero) }, "not those that its TPM quoted"},
		"values exchanged": {func(secret []byte) []byte {
			return f.sign(t, tpm2.Marshal(quote(secret, pcrs, vals)), [][]byte{vals[1], vals[0]})
		}, "not those that its TPM quoted"},
		"one value": {func(secret []byte) []byte { return f.sign(t, tpm2.Marshal(quote(secret, pcrs, vals)), vals[:1]) }, "holds 1 PCRs; 2 were asked for"},
		"values shifted": {func(secret []byte) []byte {
			return f.sign(t, tpm2.Marshal(quote(secret, pcrs, vals)), [][]byte{vals[0][:31], append([]byte{1}, vals[1]...)})
		}, "does not have 32 bytes"},
		"other PCRs": {selecting(func(i *tpm2.TPMSQuoteInfo) {
			i.PCRSelect.PCRSelections[0].PCRSelect = tpm2.PCClientCompatible.PCRs(0, 6)
		}), "quote is of the PCRs [0 6]"},
		"fewer PCRs":           {selecting(func(i *tpm2.TPMSQuoteInfo) { i.PCRSelect.PCRSelections[0].PCRSelect = tpm2.PCClientCompatible.PCRs(0) }), "quote is of the PCRs [0]"},
		"PCRs beyond the last": {selecting(func(i *tpm2.TPMSQuoteInfo) { i.PCRSelect.PCRSelections[0].PCRSelect = bytes.Repeat([]byte{0xff}, 255) }), "quote is of the PCRs"},
		"no bank":              {selecting(func(i *tpm2.TPMSQuoteInfo) { i.PCRSelect.PCRSelections = nil }), "quote is of the PCRs []"},
		"the bank of SHA-1":    {selecting(func(i *tpm2.TPMSQuoteInfo) { i.PCRSelect.PCRSelections[0].Hash = tpm2.TPMAlgSHA1 }), "bank of PCRs 0x0004"},
		"two banks": {selecting(func(i *tpm2.TPMSQuoteInfo) {
			i.PCRSelect.PCRSelections = append(i.PCRSelect.PCRSelections, i.PCRSelect.PCRSelections[0])
		}), "2 banks"},
		"no digest": {selecting(func(i *tpm2.TPMSQuoteInfo) { i.PCRDigest.Buffer = nil }), "not those that its TPM quoted"},
		"cut off": {func(secret []byte) []byte {
			q := tpm2.Marshal(quote(secret, pcrs, vals))
			return f.sign(t, q[:len(q)-1], vals)
		}, "cut off"},
		"a byte too much": {func(secret []byte) []byte {
			return f.sign(t, append(tpm2.Marshal(quote(secret, pcrs, vals)), 0), vals)
		}, "1 bytes after its end"},
		"another key's signature": {func(secret []byte) []byte {
			return newForger(t).sign(t, tpm2.Marshal(quote(secret, pcrs, vals)), vals)
		}, "not signed with the attestation key"},
		"a signature of something else": {func(secret []byte) []byte {
			r := unmarshal[response](t, f.sign(t, tpm2.Marshal(quote(secret, pcrs, zero)), vals))
			r.Quote = tpm2.Marshal(quote(secret, pcrs, vals))
			return marshal(t, r)
		}, "not signed with the attestation key"},
		"no signature": {func(secret []byte) []byte {
			return marshal(t, response{tpm2.Marshal(quote(secret, pcrs, vals)), nil, vals})
		}, "not signed"},
		"no quote":     {func([]byte) []byte { return f.sign(t, nil, vals) }, "cut off"},
		"nothing":      {func([]byte) []byte { return nil }, "malformed"},
		"null":         {func([]byte) []byte { return []byte("null") }, "holds 0 PCRs"},
		"no object":    {func([]byte) []byte { return []byte("[]") }, "malformed"},
		"far too much": {func([]byte) []byte { return make([]byte, 1<<20) }, "the most is 8192"},
		"far too many": {func([]byte) []byte { return []byte(`{"pcrs": [` + strings.Repeat(`"",`, 2000) + `""]}`) }, "holds 2001 PCRs"},
		"a trailing word": {func(secret []byte) []byte {
			return append(f.sign(t, tpm2.Marshal(quote(secret, pcrs, vals)), vals), " x"...)
		}, "malformed"},
	} {
		asked := 0
		evidence, err := s.Verify(t.Context(), f.payload(t), func(_ context.Context, data []byte) ([]byte, error) {
			asked++
			return c.respond(f.activate(t, unmarshal[challenge](t, data))), nil
		})
		if (err == nil) != (c.want == "") || err != nil && (evidence != nil || !strings.Contains(err.Error(), c.want)) || asked != 1 {
			t.Errorf("%s: error is %v, want one with %q; challenged %d times", name, err, c.want, asked)
		}
	}
}

func TestAMalformedPayloadIsRefused(t *testing.T) {
	t.Parallel()
	f := newForger(t)
	ek, ak := pkix(t, f.ek.Public()), pkix(t, f.ak.Public())
	key := func(curve elliptic.Curve) []byte {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return pkix(t, k.Public())
	}
	withRSA := func(bits uint, exponent int) []byte {
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return pkix(t, crypto.PublicKey(&rsa.PublicKey{N: n.SetBit(n, 0, 1), E: exponent}))
	}
	good := string(f.payload(t))
	for name, c := range map[string]struct{ payload, want string }{
		"nothing":                  {"", "malformed"},
		"null":                     {"null", "malformed endorsement key"},
		"an empty object":          {"{}", "malformed endorsement key"},
		"not an object":            {"[]", "malformed"},
		"no base64":                {`{"endorsement_key": "?"}`, "malformed"},
		"no endorsement key":       {string(marshal(t, payload{AK: ak})), "malformed endorsement key"},
		"no attestation key":       {string(marshal(t, payload{EK: ek})), "malformed attestation key"},
		"half a key":               {string(marshal(t, payload{EK: ek[:100], AK: ak})), "malformed endorsement key"},
		"a key that goes on":       {string(marshal(t, payload{EK: append(bytes.Clone(ek), 0), AK: ak})), "malformed endorsement key"},
		"an RSA attestation key":   {string(marshal(t, payload{EK: ek, AK: ek})), "not on P-256"},
		"attestation key on P-384": {string(marshal(t, payload{EK: ek, AK: key(elliptic.P384())})), "not on P-256"},
		"endorsement key on P-384": {string(marshal(t, payload{EK: key(elliptic.P384()), AK: ak})), "P-384"},
		"RSA of 1024 bits":         {string(marshal(t, payload{EK: withRSA(1024, 65537), AK: ak})), "1024 bits"},
		"RSA of 65536 bits":        {string(marshal(t, payload{EK: withRSA(65536, 65537), AK: ak})), "65536 bits"},
		"exponent 3":               {string(marshal(t, payload{EK: withRSA(2048, 3), AK: ak})), "exponent 3;"},
		"a key that is not listed": {string(marshal(t, payload{EK: key(elliptic.P256()), AK: ak})), "is not one of those"},
		"trailing JSON":            {good + good, "malformed"},
		"far too much":             {good + strings.Repeat(" ", 16<<10), "the most is 16384"},
	} {
		_, err := f.trusting(t).Verify(t.Context(), []byte(c.payload), unasked(t))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %.200v, want one with %q", name, err, c.want)
		}
	}
}

func TestACertificateOfAnotherKeyIsRefused(t *testing.T) {
	t.Parallel()
	f := newForger(t)
	ca, cert := endorse(t, newForger(t).ak.Public())
	s := newServer(t, tpmek.ServerConfig{EndorsementCAPath: ca})
	_, err := s.Verify(t.Context(), marshal(t, payload{EK: pkix(t, f.ek.Public()), Cert: derOf(t, cert), AK: pkix(t, f.ak.Public())}), unasked(t))
	if err == nil || !strings.Contains(err.Error(), "not of the endorsement key that the node attests with") {
		t.Errorf("got %v", err)
	}
}

func FuzzPayload(f *testing.F) {
	forger := newForger(f)
	s := forger.trusting(f)
	f.Add(forger.payload(f))
	f.Add([]byte(`{"endorsement_key":"MFkw","endorsement_certificate":null,"attestation_key":""}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		evidence, err := s.Verify(t.Context(), data, func(context.Context, []byte) ([]byte, error) { return nil, context.Canceled })
		if err == nil {
			t.Errorf("admitted without a quote: %+v", evidence)
		}
	})
}

// FuzzQuote signs whatever it is given, and never has the secret.
func FuzzQuote(f *testing.F) {
	forger := newForger(f)
	s := forger.trusting(f, 7)
	vals := [][]byte{make([]byte, 32)}
	f.Add(tpm2.Marshal(quote(make([]byte, 32), []uint{7}, vals)))
	f.Fuzz(func(t *testing.T, said []byte) {
		evidence, err := s.Verify(t.Context(), forger.payload(t), func(context.Context, []byte) ([]byte, error) { return forger.sign(t, said, vals), nil })
		if err == nil {
			t.Errorf("admitted by %x: %+v", said, evidence)
		}
	})
}

func FuzzResponse(f *testing.F) {
	forger := newForger(f)
	s := forger.trusting(f, 7)
	vals := [][]byte{make([]byte, 32)}
	f.Add(forger.sign(f, tpm2.Marshal(quote(make([]byte, 32), []uint{7}, vals)), vals))
	f.Add([]byte(`{"quote":"/1RDRw==","signature":"MAYCAQECAQE=","pcrs":[""]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if evidence, err := s.Verify(t.Context(), forger.payload(t), func(context.Context, []byte) ([]byte, error) { return data, nil }); err == nil {
			t.Errorf("admitted by %s: %+v", data, evidence)
		}
	})
}

func FuzzChallenge(f *testing.F) {
	maker := harness.NewTPMMaker(f)
	agent := newAgent(f, tpmek.AgentConfig{Device: maker.NewTPM(f).Socket})
	sum := sha256.Sum256(nil)
	f.Add(marshal(f, challenge{sum[:], make([]byte, 256), []uint{7}}))
	f.Add([]byte(`{"credential":"AAAA","secret":"AAAA","pcrs":[0,1,2]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := agent.Proof(t.Context()); err != nil {
			t.Fatal(err)
		}
		if answer, err := agent.Respond(t.Context(), data); err == nil {
			t.Errorf("challenge %s is answered by %s", data, answer)
		}
	})
}
