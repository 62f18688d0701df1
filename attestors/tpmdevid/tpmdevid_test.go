package tpmdevid_test

import (
	"context"
	"crypto/sha1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/tpm"
	"github.com/hallmark-id/hallmark/attestors/tpmdevid"
	"github.com/hallmark-id/hallmark/test/harness"
)

func TestANodeAttestsByItsDevID(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	device := maker.NewTPM(t)
	s := newServer(t, ca.bundle(t), maker.CA)
	for name, c := range map[string]tpmdevid.AgentConfig{
		"RSA":                 ca.provision(t, device, devIDTemplate(tpm2.TPMAlgRSA), ""),
		"ECC":                 ca.provision(t, device, devIDTemplate(tpm2.TPMAlgECC), ""),
		"ECC with a password": ca.provision(t, device, devIDTemplate(tpm2.TPMAlgECC), "secret"),
	} {
		block, _ := pem.Decode(read(t, c.DevIDCertPath))
		want := []string{
			fmt.Sprintf("tpm_devid:ca:fingerprint:%x", sha1.Sum(ca.cert.Raw)),
			"tpm_devid:issuer:cn:machines",
			"tpm_devid:subject:cn:host-1",
		}
		agent := newAgent(t, c)
		for range 3 { // the TPM has room for three keys
			evidence, err := attest(t, s, agent)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			var got []string
			for _, selector := range evidence.Selectors {
				got = append(got, selector.String())
			}
			if path := fmt.Sprintf("tpm_devid/%x", sha1.Sum(block.Bytes)); evidence.Path != path || !evidence.CanReattest || !slices.Equal(got, want) {
				t.Errorf("%s: evidence is %+v, want the path %s and the selectors %q", name, evidence, path, want)
			}
		}
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestKeysAreReadWithTheirLengthToo(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	c := ca.provision(t, maker.NewTPM(t), devIDTemplate(tpm2.TPMAlgECC), "")
	for _, path := range []string{c.DevIDPubPath, c.DevIDPrivPath} { // as tpm2_create writes them
		data := read(t, path)
		write(t, path, append(binary.BigEndian.AppendUint16(nil, uint16(len(data))), data...))
	}
	if _, err := attest(t, newServer(t, ca.bundle(t), maker.CA), newAgent(t, c)); err != nil {
		t.Error(err)
	}
}

func TestAnAgentSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	one, two := maker.NewTPM(t), maker.NewTPM(t)
	good := ca.provision(t, one, devIDTemplate(tpm2.TPMAlgECC), "")
	other := ca.provision(t, one, devIDTemplate(tpm2.TPMAlgECC), "")
	guarded := ca.provision(t, one, devIDTemplate(tpm2.TPMAlgECC), "secret")
	with := func(c tpmdevid.AgentConfig, change func(*tpmdevid.AgentConfig)) tpmdevid.AgentConfig {
		change(&c)
		return c
	}
	empty := write(t, filepath.Join(t.TempDir(), "empty"), nil)
	for name, c := range map[string]struct {
		config tpmdevid.AgentConfig
		want   string
	}{
		"no TPM":              {with(good, func(c *tpmdevid.AgentConfig) { c.Device = "/no" }), "/no: no such file"},
		"no certificate":      {with(good, func(c *tpmdevid.AgentConfig) { c.DevIDCertPath = "/no" }), "/no: no such file"},
		"another certificate": {with(good, func(c *tpmdevid.AgentConfig) { c.DevIDCertPath = other.DevIDCertPath }), "is not of the key in"},
		"another private key": {with(good, func(c *tpmdevid.AgentConfig) { c.DevIDPrivPath = other.DevIDPrivPath }), "load the DevID key"},
		"another TPM":         {with(good, func(c *tpmdevid.AgentConfig) { c.Device = two.Socket }), "was it made in this TPM"},
		"an empty public key": {with(good, func(c *tpmdevid.AgentConfig) { c.DevIDPubPath = empty }), "cut off"},
		"a wrong password":    {with(guarded, func(c *tpmdevid.AgentConfig) { c.DevIDPassword = "wrong" }), "certify a key"},
		"a CA's certificate":  {with(good, func(c *tpmdevid.AgentConfig) { c.DevIDCertPath = ca.bundle(t) }), "that of a certificate authority"},
	} {
		_, err := newAgent(t, c.config).Proof(t.Context())
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
	for want, c := range map[string]tpmdevid.AgentConfig{
		"devid_cert_path is missing": {DevIDPrivPath: "x", DevIDPubPath: "x"},
		"devid_priv_path is missing": {DevIDCertPath: "x", DevIDPubPath: "x"},
		"devid_pub_path is missing":  {DevIDCertPath: "x", DevIDPrivPath: "x"},
	} {
		if _, err := tpmdevid.NewAgent(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
	}
}

func TestAContradictoryConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	good := newAuthority(t).bundle(t)
	for want, c := range map[string]tpmdevid.ServerConfig{
		"devid_ca_path is missing":       {EndorsementCAPath: good},
		"endorsement_ca_path is missing": {DevIDCAPath: good},
		"devid_ca_path: stat /no":        {DevIDCAPath: "/no", EndorsementCAPath: good},
		"endorsement_ca_path: stat /no":  {DevIDCAPath: good, EndorsementCAPath: "/no"},
	} {
		if _, err := tpmdevid.New(c, tpmdevid.Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
	}
}

func TestAuthoritiesThatCannotBeReadAdmitNobody(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	agent := newAgent(t, ca.provision(t, maker.NewTPM(t), devIDTemplate(tpm2.TPMAlgECC), ""))
	p := proof(t, agent)
	endorsement := write(t, filepath.Join(t.TempDir(), "makers.pem"), read(t, maker.CA))
	devID := ca.bundle(t)
	s := newServer(t, devID, endorsement)
	for _, path := range []string{devID, endorsement} {
		whole := read(t, path)
		write(t, path, whole[:len(whole)/2])
		if _, err := s.Verify(t.Context(), p, unasked(t)); !errors.Is(err, attestors.ErrUnavailable) || strings.Contains(err.Error(), path) {
			t.Errorf("got %v, want that it cannot be checked now, and no path", err)
		}
		write(t, path, whole)
	}
	if _, err := s.Verify(t.Context(), p, agent.Respond); err != nil {
		t.Error(err)
	}
}

func TestAnAgentAnswersOneChallengeAProof(t *testing.T) {
	t.Parallel()
	maker, ca := harness.NewTPMMaker(t), newAuthority(t)
	agent := newAgent(t, ca.provision(t, maker.NewTPM(t), devIDTemplate(tpm2.TPMAlgECC), ""))
	s := newServer(t, ca.bundle(t), maker.CA)
	if _, err := agent.Respond(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "follows no proof") {
		t.Errorf("without a proof: %v", err)
	}
	if _, err := s.Verify(t.Context(), proof(t, agent), func(ctx context.Context, c []byte) ([]byte, error) {
		answer, err := agent.Respond(ctx, c)
		if _, again := agent.Respond(ctx, c); again == nil {
			t.Error("a second challenge is answered")
		}
		return answer, err
	}); err != nil {
		t.Error(err)
	}
	long := strings.Repeat("AAAA", 60)
	for _, bad := range []string{"", "null", "{}", "[]", `{"DevID": "AAAA"}`, `{"DevID": "` + long + `", "CredActivation": {"Credential": "AAAA", "Secret": "AAAA"}}`,
		`{"DevID": "` + long[:44] + `"}`, `{"DevID": "` + long[:44] + `", "CredActivation": {"Credential": "AAAA"}}`,
		`{"DevID": "` + long[:44] + `", "CredActivation": {"Credential": "AAAA", "Secret": "AAAA"}}`, strings.Repeat(" ", 9000)} {
		proof(t, agent)
		if _, err := agent.Respond(t.Context(), []byte(bad)); err == nil {
			t.Errorf("%.60q is answered", bad)
		}
	}
	if _, err := attest(t, s, agent); err != nil { // the TPM is as before
		t.Error(err)
	}
}

// loaded makes a key in a TPM for as long as it is open.
func loaded(t testing.TB, d *tpm.Device, area tpm2.TPMTPublic) *tpm.Key {
	t.Helper()
	k, err := d.CreatePrimary(tpm2.TPMRHNull, "", area)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
