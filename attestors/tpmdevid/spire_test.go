package tpmdevid_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"io"
	"testing"

	"github.com/google/go-tpm/legacy/tpm2"
	"github.com/google/go-tpm/legacy/tpm2/credactivation"
	newtpm2 "github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpmutil"

	"github.com/hallmark-id/hallmark/attestors/tpmdevid"
	"github.com/hallmark-id/hallmark/test/harness"
)

// SPIRE's halves use an older library, with its own reading of the TPM's
// structures. Here that library takes the place of each half in turn, with the
// commands that SPIRE's gives.

// node is a node of SPIRE: its keys have passwords, and its attestation key lies
// below the storage key.
type node struct {
	tpm           io.ReadWriteCloser
	devID, ak, ek tpmutil.Handle
	devIDPassword string
	cert          []byte
	public        []byte // of the DevID key
	akPublic      []byte
}

const akPassword = "of the attestation key"

func newNode(t *testing.T, c tpmdevid.AgentConfig, cert *x509.Certificate) *node {
	t.Helper()
	device, err := tpm2.OpenTPM(c.Device)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{tpm: device, devIDPassword: c.DevIDPassword, cert: cert.Raw, public: read(t, c.DevIDPubPath)}
	const srkPassword = "of the storage key"
	srk, _, _, _, _, _, err := tpm2.CreatePrimaryEx(device, tpm2.HandleOwner, tpm2.PCRSelection{}, "", srkPassword, tpm2.Public{
		Type: tpm2.AlgRSA, NameAlg: tpm2.AlgSHA256, Attributes: tpm2.FlagStorageDefault | tpm2.FlagNoDA,
		RSAParameters: &tpm2.RSAParams{Symmetric: &tpm2.SymScheme{Alg: tpm2.AlgAES, KeyBits: 128, Mode: tpm2.AlgCFB}, KeyBits: 2048},
	})
	if err != nil {
		t.Fatal(err)
	}
	if n.devID, _, err = tpm2.Load(device, srk, srkPassword, n.public, read(t, c.DevIDPrivPath)); err != nil {
		t.Fatal(err)
	}
	private, public, _, _, _, err := tpm2.CreateKey(device, srk, tpm2.PCRSelection{}, srkPassword, akPassword, tpm2.Public{
		Type: tpm2.AlgRSA, NameAlg: tpm2.AlgSHA256, Attributes: tpm2.FlagSignerDefault,
		RSAParameters: &tpm2.RSAParams{Sign: &tpm2.SigScheme{Alg: tpm2.AlgRSASSA, Hash: tpm2.AlgSHA256}, KeyBits: 2048},
	})
	if err != nil {
		t.Fatal(err)
	}
	n.akPublic = public
	if n.ak, _, err = tpm2.Load(device, srk, srkPassword, public, private); err != nil {
		t.Fatal(err)
	}
	if err := tpm2.FlushContext(device, srk); err != nil {
		t.Fatal(err)
	}
	n.ek = 0x81010001
	return n
}

func (n *node) payload(t *testing.T) []byte {
	t.Helper()
	inNV, err := tpm2.NVRead(n.tpm, 0x01c00002)
	if err != nil {
		t.Fatal(err)
	}
	var certificate asn1.RawValue
	if _, err := asn1.Unmarshal(inNV, &certificate); err != nil {
		t.Fatal(err)
	}
	ek, _, _, err := tpm2.ReadPublic(n.tpm, n.ek)
	if err != nil {
		t.Fatal(err)
	}
	ekPublic, err := ek.Encode()
	if err != nil {
		t.Fatal(err)
	}
	certified, signature := n.certify(t)
	return marshal(t, payload{[][]byte{n.cert}, n.public, certificate.FullBytes, ekPublic, n.akPublic, certified, signature})
}

func (n *node) certify(t *testing.T) (certified, signature []byte) {
	t.Helper()
	for range 10 {
		var err error
		certified, signature, err = tpm2.Certify(n.tpm, n.devIDPassword, akPassword, n.devID, n.ak, nil)
		if warning := (&tpm2.Warning{}); errors.As(err, warning) && warning.Code == tpm2.RCRetry {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		break
	}
	return certified, signature
}

func (n *node) respond(t *testing.T, c challenge) []byte {
	t.Helper()
	digest, ticket, err := tpm2.Hash(n.tpm, tpm2.AlgSHA256, c.DevID, tpm2.HandlePlatform)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := tpm2.Sign(n.tpm, n.devID, n.devIDPassword, digest, ticket, nil)
	if err != nil {
		t.Fatal(err)
	}
	session, _, err := tpm2.StartAuthSession(n.tpm, tpm2.HandleNull, tpm2.HandleNull, make([]byte, 16), nil, tpm2.SessionPolicy, tpm2.AlgNull, tpm2.AlgSHA256)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := tpm2.PolicySecret(n.tpm, tpm2.HandleEndorsement, tpm2.AuthCommand{Session: tpm2.HandlePasswordSession}, session, nil, nil, nil, 0); err != nil {
		t.Fatal(err)
	}
	secret, err := tpm2.ActivateCredentialUsingAuth(n.tpm, []tpm2.AuthCommand{
		{Session: tpm2.HandlePasswordSession, Auth: []byte(akPassword)}, {Session: session},
	}, n.ak, n.ek, c.CredActivation.Credential, c.CredActivation.Secret)
	if err != nil {
		t.Fatal(err)
	}
	return marshal(t, response{signature.RSA.Signature, secret})
}

func TestANodeOfSPIREAttestsHere(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	config := ca.provision(t, maker.NewTPM(t), devIDTemplate(newtpm2.TPMAlgRSA), "secret")
	area, err := tpm2.DecodePublic(read(t, config.DevIDPubPath))
	if err != nil {
		t.Fatal(err)
	}
	public, err := area.Key()
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t, config, ca.certify(t, public, nil))
	defer n.tpm.Close()
	evidence, err := newServer(t, ca.bundle(t), maker.CA).Verify(t.Context(), n.payload(t), func(_ context.Context, data []byte) ([]byte, error) {
		return n.respond(t, unmarshal[challenge](t, data)), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(evidence.Selectors) != 3 {
		t.Errorf("evidence is %+v", evidence)
	}
}

func TestOurNodeAttestsAtSPIREsServer(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	agent := newAgent(t, ca.provision(t, maker.NewTPM(t), devIDTemplate(newtpm2.TPMAlgRSA), ""))
	p := unmarshal[payload](t, proof(t, agent))
	decode := func(data []byte) tpm2.Public {
		t.Helper()
		area, err := tpm2.DecodePublic(data)
		if err != nil {
			t.Fatal(err)
		}
		return area
	}
	devID, ak, ek := decode(p.DevIDPub), decode(p.AKPub), decode(p.EKPub)
	certificate, err := x509.ParseCertificate(p.EKCert)
	if err != nil {
		t.Fatal(err)
	}
	ekPublic, err := ek.Key()
	if err != nil || !ekPublic.(*rsa.PublicKey).Equal(certificate.PublicKey) {
		t.Fatalf("the endorsement key is not that of the certificate: %v", err)
	}

	akPublic, err := ak.Key()
	if err != nil {
		t.Fatal(err)
	}
	signature, err := tpm2.DecodeSignature(bytes.NewBuffer(p.CertificationSignature))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(p.CertifiedDevID)
	if err := rsa.VerifyPKCS1v15(akPublic.(*rsa.PublicKey), crypto.SHA256, digest[:], signature.RSA.Signature); err != nil {
		t.Fatal(err)
	}
	said, err := tpm2.DecodeAttestationData(p.CertifiedDevID)
	if err != nil {
		t.Fatal(err)
	}
	if matches, err := said.AttestedCertifyInfo.Name.MatchesPublic(devID); err != nil || !matches {
		t.Fatalf("another key is certified: %v", err)
	}

	name, err := ak.Name()
	if err != nil {
		t.Fatal(err)
	}
	nonce, secret := make([]byte, 32), make([]byte, 32)
	rand.Read(nonce)
	rand.Read(secret)
	credential, encrypted, err := credactivation.Generate(name.Digest, ekPublic, int(ek.RSAParameters.Symmetric.KeyBits)/8, secret)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := agent.Respond(t.Context(), marshal(t, challenge{nonce, &struct{ Credential, Secret []byte }{credential[2:], encrypted[2:]}}))
	if err != nil {
		t.Fatal(err)
	}
	r := unmarshal[response](t, answer)
	leaf, err := x509.ParseCertificate(p.DevIDCert[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := leaf.CheckSignature(x509.SHA256WithRSA, nonce, r.DevID); err != nil || !bytes.Equal(r.CredActivation, secret) {
		t.Errorf("SPIRE's server would refuse the response: %v", err)
	}
}
