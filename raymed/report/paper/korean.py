"""Korean for what runs write down in English: a methods section is otherwise half in one language and half in another.

What stands in no table here, such as the words of a sheet, stays as it is.
"""

import re

from raymed.report.paper.tables import label

_METRICS = {
    "auroc": "수신자 조작 특성 곡선 아래 면적(AUROC)",
    "auprc": "정밀도-재현율 곡선 아래 면적(AUPRC, 평균 정밀도)",
    "sensitivity": "민감도",
    "specificity": "특이도",
    "ppv": "양성 예측도",
    "npv": "음성 예측도",
    "lr_positive": "양성 우도비",
    "lr_negative": "음성 우도비",
    "accuracy": "정확도",
    "brier": "Brier 점수",
    "ece": "기대 보정 오차",
    "calibration_slope": "보정 기울기",
    "calibration_intercept": "보정 절편",
    "calibration_in_the_large": "전체 보정(calibration in the large)",
}
_FACTS = {
    "cross-entropy": "교차 엔트로피",
    "focal loss": "초점 손실(focal loss)",
    "asymmetric loss": "비대칭 손실(asymmetric loss)",
    "poly loss": "poly 손실(poly loss)",
    "supervised contrastive loss": "지도 대조 손실(supervised contrastive loss)",
    "SGD with Nesterov momentum": "Nesterov 모멘텀을 쓰는 SGD",
    "Platt scaling": "Platt 보정(Platt scaling)",
    "temperature": "온도 조정(temperature scaling)",
    "isotonic": "등위 회귀(isotonic regression)",
    "the validation set": "검증",
    "the out-of-fold scores of the other folds": "나머지 폴드의 폴드 밖 점수",
    "the validation scores of the inner folds": "내부 폴드의 검증 점수",
    "the pretrained weights of timm": "timm의 사전학습 가중치",
    "Heat maps were made by Grad-CAM.": "열지도는 Grad-CAM으로 만들었다.",
    "Heat maps were made by Grad-CAM and compared with those of the same network with random weights.": (
        "열지도는 Grad-CAM으로 만들었으며, 가중치를 무작위로 바꾼 같은 신경망의 열지도와 비교하였다."
    ),
}
_REASONS = {
    "not an image": "영상이 아님",
    "no row in the sheet": "시트에 행이 없음",
    "unlabelled": "판정하지 않음",
    "its row cannot be used": "시트의 행을 쓸 수 없음",
    "duplicate key": "중복된 번호",
    "several patients with one key": "한 번호에 여러 환자",
    "not used": "사용하지 않음",
    "duplicate or unusable": "중복되었거나 쓸 수 없음",
}


def korean(text: str | None) -> str | None:
    """A fact of a record in Korean, or as it is."""
    return _FACTS.get(text, re.sub(r"CPU cores$", "CPU 코어", text)) if text else text


def korean_reason(text: str) -> str:
    """A reason of exclusion: "unlabelled: equivocal" -> "판정하지 않음: equivocal"."""
    parts = [_REASONS.get(part, part) for part in text.split(": ")]
    return ": ".join(f"영상 종류 {p.removeprefix('modality ')}" if p.startswith("modality ") else p for p in parts)


def korean_metric(metric: str) -> str:
    """`label` in Korean: "민감도(특이도 0.9일 때)"."""
    name, _, at = metric.partition("_at_")
    if metric in _METRICS or not at:
        return _METRICS.get(metric) or label(metric)
    held, _, value = at.rpartition("_")
    return f"{korean_metric(name)}({_METRICS.get(held, '유병률')} {value}일 때)"
